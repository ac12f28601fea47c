"""`mossrlhf demo`: what it passes on, and with what exit code it ends."""

import sys

import pytest

from mossrlhf import cli, demo


def test_arguments_reach_the_demo(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "main", lambda config: asked.append(config) or {"interrupted": False})
    cli.main(["demo", "--lang", "zh", "--seed", "3", "--output_dir", "x"])
    assert asked == [demo.DemoConfig(lang="zh", seed=3, output_dir="x")]


def test_an_interrupted_run_ends_with_130(monkeypatch):
    monkeypatch.setattr(demo, "main", lambda config: {"interrupted": True})
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo"])
    assert ended.value.code == 130


def test_ctrl_c_before_ppo_is_one_line(monkeypatch, tmp_path, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fine_tune", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--output_dir", str(tmp_path)])
    assert ended.value.code == 130
    assert capsys.readouterr().err == (
        "\nInterrupted in the stage sft: this run leaves no summary.\n"
    )


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(demo, "main", lambda config: pytest.fail("it begins"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--output_dir", str(tmp_path)])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        'mossrlhf demo: plotting needs matplotlib: pip install "mossrlhf[plot]"\n'
    )


@pytest.mark.parametrize("argv", [["--help"], ["demo", "--help"]])
def test_help_fits_a_console(argv, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main(argv)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "toy world" in printed
