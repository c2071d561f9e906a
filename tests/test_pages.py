"""The pages: links lead to what is there, and sentences are short enough to read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "ref/THEORY.md",
    *(f"{room}/README.md" for room in ("ref", "ref/vectors", "ext", "train", "tests")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page):
    """What a heading is called in a link."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_to_files_and_headings_that_exist(page):
    here = ROOT / page
    links = [link for link in LINK.findall(here.read_text()) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page} links to {link}: no such heading"


def sentences(text):
    """Of the running text: no code, no tables, no links' addresses, and not the plan, which stays as declared."""
    text = re.sub(r"## Analysis plan.*?(?=\n## )", "", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not re.match(r"    |\s*\||#|!\[", line))
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", text))
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", text):
        yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_has_more_than_30_words(page):
    long = [s for s in sentences((ROOT / page).read_text()) if len(re.findall(r"[\w'-]*[a-zA-Z][\w'-]*", s)) > 30]
    assert not long, long


def test_the_first_page_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
