"""What the benchmarks of reward models and weights compute beside measuring."""

import json
from functools import partial

import pytest
import torch


@pytest.fixture
def load(script):
    return lambda name: script(f"benchmarks/{name}.py")


def test_the_page_of_weights_has_the_kept_figures(load):
    benchmark = load("weight_diff")
    figures = json.loads(benchmark.FIGURES.read_text())
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert benchmark.with_table(page, figures) == page
    for row in figures["rows"]:
        assert row["exact"]
        assert row["parameters"] >= 200e6
        for way in ("make_diff", "recover"):
            assert row[way]["peak_mb"] <= row[way]["bound_mb"]


def test_auc_is_the_share_of_pairs_in_order(load):
    auc = load("preference_noise").auc
    ours, theirs = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 0.0])
    pairs = [(a > b) + 0.5 * (a == b) for a in ours.tolist() for b in theirs.tolist()]
    assert auc(ours, theirs) == pytest.approx(sum(pairs) / 6)


def test_noise_turns_as_many_pairs_as_it_says(load):
    study = load("preference_noise")
    pairs = [
        {"chosen": f"good {i}", "rejected": f"bad {i}", "true_margin": 3.0 - 6 * (i % 2)}
        for i in range(20)
    ]
    clean = study.truly_ordered([*pairs, {**pairs[0], "true_margin": -1.9}])
    assert len(clean) == 20
    assert all(pair["true_margin"] > 0 for pair in clean)
    noisy = study.with_noise(clean, 0.3, seed=1)
    assert sum(pair["wrong"] for pair in noisy) == 6
    assert all((pair["true_margin"] < 0) is pair["wrong"] for pair in noisy)
    assert noisy != study.with_noise(clean, 0.3, seed=2)
    found = study.describe([{**p, "flipped": p["wrong"] or i < 2} for i, p in enumerate(noisy)])
    assert found["recall"] == 1.0
    assert found["precision"] == pytest.approx(6 / (20 * found["share"]))


def test_the_table_of_methods_by_hand(load):
    study = load("preference_noise")
    seed = {"clean": 0.9, "none": 0.7, "flipping": 0.8, "auc": 0.85}
    seed["flipped"] = {"share": 0.3, "precision": 0.75, "recall": 0.5}
    seed["wrong_labels_left"] = [0.1, 0.0725]
    settings = {"pairs": 10, "noise": 0.3, "models": 4, "folds": 2, "rounds": 3}
    page = "before\n" + "stale\n".join(study.MARKS) + "after\n"
    new = study.with_table(page, {"seeds": {"0": seed, "1": seed}, "settings": settings})
    assert "| flipping | 0.800 (0.800, 0.800) | 50% (50%, 50%) |" in new
    assert "| labels without noise | 0.900 (0.900, 0.900) |  |" in new
    assert "AUC of 0.850" in new
    assert "After 3 rounds 7.2% of the" in new
    assert "stale" not in new


def test_padding_is_what_is_not_a_token(load):
    benchmark = load("pair_batches")

    def rows(records):
        lengths = torch.tensor(records)
        return {"attention_mask": torch.arange(int(lengths.max())) < lengths[..., None]}

    records = [[1, 4], [2, 3], [8, 8]]
    one = benchmark.measured_padding(rows, records, [[0, 1], [2]], 1)
    assert one == {"padding": pytest.approx(1 - 26 / (16 + 16)), "batches": 2}
    two = benchmark.measured_padding(rows, records, [[0, 1], [2]], 2)
    assert two["padding"] == pytest.approx(1 - 26 / (2 * 2 + 2 * 4 + 16))


def test_the_table_of_methods_on_real_pairs_by_hand(load):
    study = load("hh_part_two")
    seeds = {str(i): dict.fromkeys(study.ARMS, 0.6 + 0.01 * i) | {"agrees": 0.7} for i in range(3)}
    for i, gain in enumerate((0.01, 0.02, 0.03)):
        seeds[str(i)]["adaptive margin"] += gain
    settings = {"pairs": 10, "held_out": 600, "models": 4, "folds": 2}
    page = "before\n" + "stale\n".join(study.MARKS) + f"after\n{study.MARKS[1]}"
    new = study.with_table(page, {"seeds": seeds, "settings": settings})
    assert new.startswith("before\n")
    assert new.endswith(f"after\n{study.MARKS[1]}")
    assert "| none | 0.610 (0.600, 0.610, 0.620) |  |" in new
    assert "| adaptive margin | 0.630 (0.610, 0.630, 0.650) | +0.020 ± 0.006 |" in new
    assert "make for one of 0.020." in new
    assert "agree with 70% of their labels" in new
    assert "stale" not in new


def test_methods_follow_each_other_and_columns_are_found(load):
    shared = load("part_two")
    add = lambda n: lambda records: [{**r, "margin": r.get("margin", 0) + n} for r in records]  # noqa: E731
    records = shared.treated([{"prompt": ""}], (add(1), add(2)))
    assert records == [{"prompt": "", "margin": 3}]
    assert shared.columns(records) == {"margin_column": "margin"}
    assert shared.columns([{"label_smoothing": 0.1}]) == {"smoothing_column": "label_smoothing"}


def test_seeds_that_are_kept_are_not_run_again(load, tmp_path, capsys):
    path = tmp_path / "figures.json"
    run_seeds = partial(load("part_two").run_seeds, command="python it.py run")
    run_seeds([1], path, {"pairs": 3}, lambda seed: {"seed": seed})
    run_seeds([1, 0], path, {"pairs": 3}, lambda seed: {"seed": 10 + seed})
    kept = json.loads(path.read_text())
    assert kept["command"] == "python it.py run 0 1"
    assert [(name, found["seed"]) for name, found in kept["seeds"].items()] == [("0", 10), ("1", 1)]
    assert "seed 1 is kept in figures.json" in capsys.readouterr().out
    beside = lambda seed: run_seeds([5], path, {"pairs": 3}, lambda s: {"seed": s}) or {}  # noqa: E731
    run_seeds([6], path, {"pairs": 3}, beside)
    assert list(json.loads(path.read_text())["seeds"]) == ["0", "1", "5", "6"]
    run_seeds([0], path, {"pairs": 4}, lambda seed: {"seed": 20})
    assert list(json.loads(path.read_text())["seeds"]) == ["0"]


@pytest.mark.parametrize("name", ["preference_noise", "hh_part_two"])
def test_the_page_has_a_place_for_the_table(load, name):
    study = load(name)
    page = study.PAGE.read_text(encoding="utf-8")
    rest = page.split(study.MARKS[0])[1]
    between = load("part_two").between(page, study.MARKS, ["| new |"])
    assert between == page.replace(
        study.MARKS[0] + rest.split(study.MARKS[1])[0], study.MARKS[0] + "| new |\n"
    )


@pytest.mark.parametrize("name", ["preference_noise", "hh_part_two"])
def test_the_page_says_what_the_figures_say(load, name):
    study = load(name)
    page = study.PAGE.read_text(encoding="utf-8")
    kept = json.loads(study.FIGURES.read_text(encoding="utf-8"))
    assert sorted(kept["seeds"]) == ["0", "1", "2"]
    assert study.with_table(page, kept) == page


def test_the_page_of_adapters_says_what_the_figures_say(load):
    study = load("lora_toy")
    page = study.PAGE.read_text(encoding="utf-8")
    kept = json.loads(study.FIGURES.read_text(encoding="utf-8"))["seeds"]
    assert sorted(kept) == ["0", "1", "2"]
    assert study.with_table(page, kept) == page
    for row in kept.values():
        assert row["win_rate"] > row["lose_rate"]
        assert not row["collapsed"]
        assert row["weights"]["all_roles"] < 1.01 * row["weights"]["base_and_adapters"]


def test_what_the_noise_took_is_regained(load):
    """By the kept figures: strength tells flipped pairs, and the methods give back half."""
    seeds = json.loads(load("preference_noise").FIGURES.read_text(encoding="utf-8"))["seeds"]
    regained = [(s["all three"] - s["none"]) / (s["clean"] - s["none"]) for s in seeds.values()]
    assert len(regained) == 3
    assert sum(regained) / 3 >= 0.5
    assert min(s["auc"] for s in seeds.values()) >= 0.8
