"""Training text from an encyclopaedia: python -m recipes.encyclopaedia_text DUMP.xml.bz2 --out FILE.

Takes a MediaWiki dump, such as the 106 articles of the English Wikipedia (CC BY-SA 3.0) that the wheel of gensim 4.4.0
on PyPI carries as gensim/test/test_data/enwiki-latest-pages-articles1.xml-*.bz2. Needs `pip install mwparserfromhell`.
"""

from __future__ import annotations

import argparse
import bz2
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

# Sections of lists of other texts, which say nothing themselves.
_APPENDIX = re.compile(r"(?:see also|references|notes|further reading|external links|bibliography|sources|footnotes)")
_NOT_PROSE = re.compile(r"\s*(?:thumb|left|right|center|upright|\d+px|File:|Image:|Category:|[|!*{}#:;])", re.I)


def articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, wiki source) of every page that is no redirect."""
    with bz2.open(dump) as xml:
        for _, element in ElementTree.iterparse(xml):
            if element.tag.endswith("}page"):
                source = element.findtext(".//{*}text") or ""
                if not source.lower().startswith("#redirect"):
                    yield element.findtext("{*}title") or "", source
                element.clear()


def prose(source: str) -> list[str]:
    """The sections of an article as plain text, each with its heading; without lists, tables, notes and templates."""
    import mwparserfromhell

    found = []
    code = mwparserfromhell.parse(source)
    for note in code.filter_tags(matches=lambda tag: tag.tag in ("ref", "table", "gallery", "math")):
        try:
            code.remove(note)
        except ValueError:  # within one that is gone already
            continue
    for section in code.get_sections(flat=True, include_lead=True):
        headings = [heading.title.strip_code().strip() for heading in section.filter_headings()]
        if headings and _APPENDIX.match(headings[0].lower()):
            continue
        text = section.strip_code(normalize=True, collapse=True)
        lines = [re.sub(r"\s+", " ", line).strip() for line in text.split("\n") if not _NOT_PROSE.match(line)]
        lines = [re.sub(r"\(\s*[;,]?\s*\)", "", line).replace("  ", " ").replace(" ,", ",") for line in lines]
        body = "\n".join(line for line in lines if line and line not in headings)
        if len(body) >= 200:
            found.append("\n".join([*headings, body]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dump", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--longest", type=int, default=6000, help="characters of a document (default %(default)s)")
    args = parser.parse_args()
    count = characters = 0
    with args.out.open("w") as out:
        for title, source in articles(args.dump):
            text = title
            for section in [*prose(source), ""]:
                if text and (not section or len(text) + len(section) > args.longest):
                    if len(text) > len(title):
                        out.write(json.dumps({"text": text}) + "\n")
                        count, characters = count + 1, characters + len(text)
                    text = title
                text += f"\n{section[: args.longest]}"
    print(f"{count} documents, {characters} characters", file=sys.stderr)


if __name__ == "__main__":
    main()
