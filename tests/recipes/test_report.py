"""What recipes write for people to read."""

import pytest

from mossrlhf.recipes.report import dialogue, samples_page, write_page


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("Once upon", "Once upon"),
        ([{"role": "user", "content": "Hi"}], "Hi"),
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "System: Be brief.\n\nHuman: Hi",
        ),
        (
            [{"role": "user", "content": "2+2"}, {"role": "tool", "content": "4"}],
            "Human: 2+2\n\ntool: 4",
        ),
    ],
)
def test_prompts_read_as_people_write_them(prompt, read):
    assert dialogue(prompt) == read


def test_pages_quote_every_line(tmp_path):
    samples = [{"prompt": "a\nb", "answers": {"policy": "", "reference": "c"}}]
    write_page("T", ["Lead."], samples, tmp_path / "page.md")
    head = "# T\n\nLead.\n\n## Prompt 1\n\n> a\n> b\n\n"
    answers = "**policy**\n\n> (empty)\n\n**reference**\n\n> c\n"
    assert (tmp_path / "page.md").read_text() == head + answers


def test_samples_are_drawn(tmp_path):
    samples = [{"prompt": str(i), "answers": {"SFT": "x"}} for i in range(5)]
    samples_page("T", samples, tmp_path / "page.md", count=2, seed=1)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith(
        "# T\n\n2 of the 5 held-out prompts, drawn at random, not chosen.\nBeneath"
    )
    assert text.count("**SFT**") == 2
