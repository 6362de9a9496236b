"""Cuts letters and digits out of twenty fonts of Debian, once; the result is committed in `sprites/fonts/varied/`.

    apt-get download fonts-lato fonts-roboto-unhinted ...; dpkg-deb -x each of them into one folder
    python -m paligemma.tiny.extract_fonts --folder <folder>

Needs fonttools, which is not needed at run time. Many of these fonts reserve their name for unmodified copies (Open
Font License, section 3), so the pieces are named by number; `index.json` says what each was cut out of.
"""

import argparse
import json
from pathlib import Path

from paligemma.tiny.world import CHARACTERS

TARGET = Path(__file__).with_name("sprites") / "fonts" / "varied"
FONTS = {  # file in the package: (Debian package and version, licence)
    "Lato-Regular.ttf": ("fonts-lato 2.0-2.1", "OFL-1.1"),
    "Lato-Black.ttf": ("fonts-lato 2.0-2.1", "OFL-1.1"),
    "Roboto-Medium.ttf": ("fonts-roboto-unhinted 2:0~20170802-3", "Apache-2.0"),
    "RobotoCondensed-Bold.ttf": ("fonts-roboto-unhinted 2:0~20170802-3", "Apache-2.0"),
    "OpenSans-Semibold.ttf": ("fonts-open-sans 1.11-2", "Apache-2.0"),
    "LiberationSans-Regular.ttf": ("fonts-liberation2 2.1.5-1", "OFL-1.1"),
    "LiberationSerif-Bold.ttf": ("fonts-liberation2 2.1.5-1", "OFL-1.1"),
    "LiberationMono-Bold.ttf": ("fonts-liberation2 2.1.5-1", "OFL-1.1"),
    "Cantarell-Bold.otf": ("fonts-cantarell 0.303.1-1", "OFL-1.1"),
    "Comfortaa-Bold.ttf": ("fonts-comfortaa 3.001-3", "OFL-1.1"),
    "Karla-Bold.otf": ("fonts-karla 20201218-1", "OFL-1.1"),
    "Carlito-Regular.ttf": ("fonts-crosextra-carlito 20220224-1", "OFL-1.1"),
    "Caladea-Regular.ttf": ("fonts-crosextra-caladea 20200211-1", "OFL-1.1"),
    "Play-Regular.ttf": ("fonts-play 1.002+20150307.1-0.1", "OFL-1.1"),
    "Quicksand-Medium.ttf": ("fonts-quicksand 0.2016-2.1", "OFL-1.1"),
    "Vollkorn-SemiBold.ttf": ("fonts-vollkorn 4.105-2", "OFL-1.1"),
    "Dosis-SemiBold.otf": ("fonts-dosis 1.7-3", "OFL-1.1"),
    "EBGaramond12-Bold.otf": ("fonts-ebgaramond 0.016+git20210310.42d4f9f2-1", "OFL-1.1"),
    "ComicNeue-Bold.otf": ("fonts-comic-neue 2.51-4", "OFL-1.1"),
    "Courier Prime Bold.otf": ("fonts-courier-prime 0+git20190115-3", "OFL-1.1"),
}
COPYRIGHT, LICENSE_NOTES = 0, (13, 14)  # ids of records in a font's table of names


def cut(source: Path, target: Path, name: str) -> str:
    """Keep letters and digits of a font, without hints and kerning, renamed. Returns its copyright notice."""
    from fontTools import subset, ttLib

    font = ttLib.TTFont(source)
    options = subset.Options(hinting=False, layout_features=[], drop_tables=["GSUB", "GPOS", "GDEF", "kern", "DSIG"])
    cutter = subset.Subsetter(options)
    cutter.populate(text=CHARACTERS)
    cutter.subset(font)
    notice = font["name"].getDebugName(COPYRIGHT) or ""
    kept = {number: font["name"].getDebugName(number) for number in (COPYRIGHT, *LICENSE_NOTES)}
    font["name"].names = []
    for number, text in {**kept, 1: name, 2: "Regular", 3: name, 4: name, 6: name.replace(" ", "")}.items():
        if text:
            font["name"].setName(text, number, 3, 1, 0x409)
    if "CFF " in font:  # the outlines of an .otf carry names of their own
        font["CFF "].cff.fontNames = [name.replace(" ", "")]
        top = font["CFF "].cff.topDictIndex[0]
        top.FullName = top.FamilyName = name
    font.save(target)
    return notice.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder with the unpacked Debian packages")
    folder = parser.parse_args().folder
    there = {path.name: path for path in folder.rglob("*")}
    if missing := [f"{file} ({package})" for file, (package, _) in FONTS.items() if file not in there]:
        parser.error(f"{folder} lacks {', '.join(missing)}: unpack these Debian packages there")
    TARGET.mkdir(parents=True, exist_ok=True)
    index = {}
    for number, (file, (package, license)) in enumerate(FONTS.items(), 1):
        source = there[file]
        target = TARGET / f"{number:02d}{source.suffix}"
        notice = cut(source, target, f"Small World {number:02d}")
        index[target.name] = {"font": file, "package": package, "license": license, "copyright": notice}
    (TARGET / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
