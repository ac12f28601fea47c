"""The table of bad inputs, by rooms; `python -m bad_inputs` writes docs/bad_inputs.md anew."""

from bad_inputs import (
    checkpoints,
    components,
    configs,
    datasets,
    files,
    models,
    pairs,
    peft,
    records,
    rewards,
    samplers,
    weights,
)

ROOMS = [
    module.room
    for module in (
        files, records, datasets, pairs, rewards, models, samplers, configs, components, peft,
        checkpoints, weights,
    )
]  # fmt: skip
