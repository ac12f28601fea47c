"""Options of `TrainerConfig`, and files of them."""

from support.options import read_yaml

from bad_inputs.room import Room
from mossrlhf import TrainerConfig

room = Room("TrainerConfig")
row = room.row


def config(given, gets, **options):
    """A row on options of a config."""
    row(given, gets, lambda shop: TrainerConfig(**options))


config(
    "an option that is misspelled",
    "TypeError: TrainerConfig has no option 'lerning_rate'; did you mean 'learning_rate'?",
    lerning_rate=0.1,
)
config(
    "an option of another library",
    "TypeError: TrainerConfig has no option 'gae_lambda'; here that is AdvantageEstimator(lam=)",
    gae_lambda=0.9,
)
config(
    "a negative learning rate",
    "ValueError: TrainerConfig(learning_rate=): got -1.0, expected a number in [0, inf]",
    learning_rate=-1.0,
)
config(
    "a learning rate that is NaN",
    "ValueError: TrainerConfig(learning_rate=): got nan, expected a number in [0, inf]",
    learning_rate=float("nan"),
)
config(
    "a learning rate that is infinite",
    "ValueError: TrainerConfig(learning_rate=): got inf, expected a finite number",
    learning_rate=float("inf"),
)
config(
    "a learning rate in quotes",
    "TypeError: TrainerConfig(learning_rate=): got '1e-5', expected a number",
    learning_rate="1e-5",
)
config(
    "None where there is no such switch",
    "TypeError: TrainerConfig(learning_rate=None): it cannot be None; leave it out",
    learning_rate=None,
)
config(
    "a minibatch larger than the rollout",
    "ValueError: TrainerConfig(minibatch_size=8, rollout_size=4): a minibatch cannot hold more "
    "responses than the rollout; lower minibatch_size",
    minibatch_size=8,
    rollout_size=4,
)
config(
    "a rollout of torn groups",
    "ValueError: TrainerConfig(rollout_size=9, samples_per_prompt=2): the rollout must hold whole "
    "groups; make rollout_size a multiple of samples_per_prompt",
    rollout_size=9,
    minibatch_size=3,
    samples_per_prompt=2,
)
config(
    "a minibatch of 0",
    "ValueError: TrainerConfig(minibatch_size=): got 0, expected a number in [1, inf]",
    minibatch_size=0,
)
config(
    "half a step",
    "ValueError: TrainerConfig(total_steps=): got 1.5, expected a whole number",
    total_steps=1.5,
)
config(
    "infinitely many steps",
    "ValueError: TrainerConfig(total_steps=): got inf, expected a whole number",
    total_steps=float("inf"),
)
config(
    "a switch in quotes, which Python takes for on",
    "TypeError: TrainerConfig(bf16=): got 'false', expected True or False",
    bf16="false",
)
config(
    "a text for a seed",
    "TypeError: TrainerConfig(seed=): got 'today', expected a number",
    seed="today",
)
config(
    "a negative seed",
    "ValueError: TrainerConfig(seed=): got -1, expected a number in [0, 4294967295]",
    seed=-1,
)
config(
    "a number for an output directory",
    "TypeError: TrainerConfig(output_dir=): got 5, expected a text",
    output_dir=5,
)
config(
    "a schedule that there is not",
    "ValueError: TrainerConfig(lr_scheduler_type='cosin'): expected one of constant, …did you mean "
    "'cosine'?",
    lr_scheduler_type="cosin",
)
config(
    "Adam's β above 1",
    "ValueError: TrainerConfig(adam_beta1=): got 1.5, expected a number in [0, 1]",
    adam_beta1=1.5,
)
row(
    "an output directory that is a file",
    "OSError: output_dir: …run' cannot be written to (…); choose another folder, or free space",
    lambda shop: shop.trainer(args=dict(output_dir=str(shop.file("run", "")))),
)
row(
    "a dict for a config",
    "TypeError: args: got ('total_steps', 3), expected TrainerConfig(...)",
    lambda shop: shop.trainer(args=("total_steps", 3)),
)
row(
    "evaluations without anything to evaluate on",
    "ValueError: TrainerConfig(eval_steps=1): there is nothing to evaluate on; pass "
    "Trainer(eval_dataset=), or set eval_steps=None",
    lambda shop: shop.stepped(args=dict(eval_steps=1)),
)
row(
    "a best metric that is measured by evaluations, without any",
    "ValueError: TrainerConfig(metric_for_best_model='eval/kl'): it is measured by evaluations, of "
    "which there are none",
    lambda shop: shop.stepped(args=dict(metric_for_best_model="eval/kl")),
)
row(
    "a best metric that there is not",
    "ValueError: TrainerConfig(metric_for_best_model='polcy/loss'): there is no such metric; the "
    "closest are ['policy/loss'",
    lambda shop: shop.stepped(args=dict(metric_for_best_model="polcy/loss")),
)
row(
    "a tracker that there is not",
    "ValueError: TrainerConfig(report_to=): got 'tensorbord', expected trackers of accelerate: "
    "…did you mean 'tensorboard'?",
    lambda shop: shop.trainer(args=dict(report_to=["tensorbord"])),
)
row(
    "prompts and responses that do not fit the context",
    "ValueError: max_prompt_length: 255 prompt tokens and max_new_tokens=4 do not fit into the "
    "model's context of 256; lower one of them",
    lambda shop: shop.trainer(args=dict(max_prompt_length=255)),
)
row(
    "a YAML file that is none",
    "ValueError: …run.yaml cannot be read as YAML: ",
    lambda shop: read_yaml(str(shop.file("run.yaml", "a: [1"))),
)
row(
    "a YAML file with an object of Python in it",
    "ValueError: …run.yaml cannot be read as YAML: could not determine a constructor",
    lambda shop: read_yaml(str(shop.file("run.yaml", "!!python/object/apply:os.getcwd []"))),
)
row(
    "a YAML file of a list",
    "ValueError: …run.yaml holds a list, expected lines of option: value",
    lambda shop: read_yaml(str(shop.file("run.yaml", "- 1"))),
)
