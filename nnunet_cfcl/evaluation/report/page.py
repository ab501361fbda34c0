"""Report of one trained fold, or of several side by side, as a self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2

import nnunet_cfcl
from nnunet_cfcl.chromap.nnunet.spaces import evenly
from nnunet_cfcl.data.attribute_table import read_attribute_table
from nnunet_cfcl.errors import UserError, isolated, listed, reason
from nnunet_cfcl.evaluation.report import sections
from nnunet_cfcl.evaluation.report.blocks import (
    Block,
    Chapter,
    Details,
    Figure,
    Gallery,
    Note,
    Section,
    Tile,
    attempt,
    metric_text,
    pictures,
)
from nnunet_cfcl.evaluation.report.chromaps import write_validation_chromaps
from nnunet_cfcl.evaluation.report.comparison import comparison
from nnunet_cfcl.evaluation.report.fold_folder import FoldFolder, read_fold
from nnunet_cfcl.evaluation.report.metrics import (
    Metrics,
    dice_line,
    evaluate_folds,
    mean_dice,
    method_names,
    metrics_blocks,
    read_metrics,
)
from nnunet_cfcl.evaluation.report.states import phases
from nnunet_cfcl.files.atomic import writable_folder, write_text_atomically
from nnunet_cfcl.nnunet.fold_files import VALIDATION, raw_folder

TEMPLATE = "page.html.j2"
#: Number of validation cases with CHRO-maps on the page.
MAPS = 3
#: Most folds, and the largest width of a picture in pixels up to that number.
WIDTHS = ((1, 1600), (3, 1200), (math.inf, 900))
#: Ratio of width to height above which a CHRO-map is a montage, which takes the whole width.
MONTAGE = 1.6


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Attributes:
        by: columns of attributes.csv to group by; None: columns with few values.
        shows_chromaps: whether the page has CHRO-maps.
        chromap_folders: folders of CHRO-maps, one per fold; empty: existing maps of the fold, else new maps.
        evaluations: further results of `nnunet_cfcl evaluate` to show.
        device: device of PyTorch for new CHRO-maps.
        processes: number of worker processes of the evaluation.
    """

    by: tuple[str, ...] | None = None
    shows_chromaps: bool = True
    chromap_folders: tuple[Path, ...] = ()
    evaluations: tuple[Path, ...] = ()
    device: str = "cpu"
    processes: int = 2


def write_report(folders: Sequence[Path], out: Path, options: ReportOptions | None = None) -> int:
    """Write the report as an HTML page.

    Args:
        folders: folders of one or more folds of one dataset and configuration; the others are compared with the first.
        out: HTML file.
        options: options of the report; None: the defaults.

    Returns:
        Size of the file in bytes.

    Raises:
        UserError: a folder is not that of a fold, the folds have different datasets or configurations, a column does
            not exist, or ``out`` cannot be written.
    """
    chosen = options or ReportOptions()
    folds = read_folds(folders, chosen)
    writable_folder(out.parent, "name another file with -o")
    with _caches(folds) as caches:
        text = render(chapters(folds, caches, chosen))
    write_text_atomically(out, text)
    return out.stat().st_size


def read_folds(folders: Sequence[Path], options: ReportOptions) -> dict[str, FoldFolder]:
    """Read and check the folds, by their names on the page.

    Raises:
        UserError: see `write_report`.
    """
    folds = [read_fold(folder) for folder in folders]
    for key in ("dataset", "configuration"):
        found = dict.fromkeys(getattr(fold.place, key) for fold in folds)
        if len(found) > 1:
            raise UserError(f"the folders are of different {key}s: found {listed(found)}, expected the same {key}",
                            "write a report of each")
    if len({fold.place.folder for fold in folds}) < len(folds):
        raise UserError("a folder is named twice, expected different folders", "name each folder once")
    if options.chromap_folders and len(options.chromap_folders) != len(folds):
        raise UserError(f"found {len(options.chromap_folders)} folders of CHRO-maps for {len(folds)} folds, expected "
                        "one per fold in the same order", "name them after --chromap, or omit the option")
    _check_columns(folds[0].place.dataset, options.by or ())
    return method_names(folds)


def _check_columns(dataset: str, by: Sequence[str]) -> None:
    raw = raw_folder(dataset) if by else None
    attributes = read_attribute_table(raw) if raw is not None else None
    known = attributes.columns if attributes is not None else {}
    if missing := [name for name in by if name not in known]:
        raise UserError(f"there is no column '{missing[0]}' to group by in the attributes.csv of {dataset}, found "
                        f"{listed(known) or 'none'}", "name one of them with --by")


@contextmanager
def _caches(folds: Mapping[str, FoldFolder]) -> Iterator[dict[str, Path]]:
    """Provide a folder for intermediate results of each fold; a temporary folder where the fold's is read-only."""
    with TemporaryDirectory() as spare:
        found = {}
        for number, (name, fold) in enumerate(folds.items()):
            try:
                found[name] = writable_folder(fold.own / "report")
            except UserError:
                found[name] = writable_folder(Path(spare) / str(number))
        yield found


def chapters(folds: Mapping[str, FoldFolder], caches: Mapping[str, Path], options: ReportOptions) -> list[Chapter]:
    """Build the comparison of several folds, and a chapter for each fold."""
    width = next(width for most, width in WIDTHS if len(folds) <= most)
    measured = _measured(folds, caches, options)
    found = [comparison(folds, measured, width)] if len(folds) > 1 else []
    for number, (name, fold) in enumerate(folds.items()):
        chapter = Chapter(f"fold{number + 1}", name, f"{fold.place.dataset}, {fold.place.configuration}, "
                          f"plans {fold.place.plans}, fold {fold.place.fold}", _tiles(name, fold, measured[name]))
        maps = options.chromap_folders[number] if options.chromap_folders else None
        chapter.sections += [
            sections.overview(fold), sections.settings(fold), sections.curves(fold, width), sections.gate(fold, width),
            *([_chromaps(fold, caches[name], maps, options, width)] if options.shows_chromaps else []),
            _metrics(name, fold, measured[name], width), sections.probe(fold, width)]
        found.append(chapter)
    if options.evaluations:
        more = [_further(number, folder, width) for number, folder in enumerate(options.evaluations)]
        found.append(Chapter("more", "Further evaluations", "Written by nnunet_cfcl evaluate", (), more))
    return found


def _measured(
    folds: Mapping[str, FoldFolder], caches: Mapping[str, Path], options: ReportOptions
) -> dict[str, Metrics | str]:
    """Measure the masks of all folds; folds with cases in common with the first are evaluated together.

    Returns:
        Name -> metrics, or the reason why there are none.
    """
    found: dict[str, Metrics | str] = dict.fromkeys(
        folds, "validation/ has no masks, which nnU-Net writes after the training")
    first = next(iter(folds))
    joint = [name for name, fold in folds.items() if set(fold.validation) & set(folds[first].validation)]
    if len(joint) > 1:
        with isolated() as errors:
            together = evaluate_folds({name: folds[name] for name in joint}, caches[first] / "comparison", options.by,
                                      options.processes)
            found |= dict.fromkeys(joint, together)
        for error in errors:
            print(f"the trainings cannot be compared case by case: {reason(error)}")
    for name, fold in folds.items():
        if fold.validation and isinstance(found[name], str):
            with isolated() as errors:
                found[name] = evaluate_folds({name: fold}, caches[name] / "evaluation", options.by, options.processes)
            for error in errors:
                found[name] = reason(error)
    return found


def _tiles(name: str, fold: FoldFolder, measured: Metrics | str) -> list[Tile]:
    states = {phase: (state, words) for phase, state, words in phases(fold)}
    tiles = [Tile(phase, state.text, words, state.tone) for phase, (state, words) in states.items()
             if phase != "final validation"]
    if isinstance(measured, Metrics):
        mean = metric_text(mean_dice(measured, name))
        tiles.append(Tile("Dice, mean of the labels", mean, dice_line(measured, name)))
    return tiles


def _metrics(name: str, fold: FoldFolder, measured: Metrics | str, most_width: int) -> Section:
    if isinstance(measured, Metrics):
        blocks = metrics_blocks(measured, [name], most_width)
    else:
        blocks = [Note(f"The masks were not measured: {measured}.", "bad" if fold.validation else "quiet"),
                  *sections.nnunet_metrics(fold)]
    return Section("metrics", "Metrics of the validation cases", "Masks of the final validation against the truth, for "
                   "all cases and by group. A perfect Dice and NSD is 1, a perfect HD95 and ASSD is 0.",
                   "Groups (scanner, disease, ...) have similar metrics, and no label is missed.", blocks)


def _chromaps(fold: FoldFolder, cache: Path, named: Path | None, options: ReportOptions, most_width: int) -> Section:
    def show() -> Sequence[Block]:
        files = _found_maps(fold, named) or write_validation_chromaps(
            fold.place, evenly(sorted(fold.validation), MAPS), cache, options.device)
        if not files:
            return [Note("There are no validation cases to map.", "quiet")]
        blocks = [block for case, file in files.items() for block in pictures(
            file.parent, [(file.name, f"CHRO-map of {case}", case)], most_width, wide=True)]
        shown = [block.picture for block in blocks if isinstance(block, Figure)]
        if any(picture.width > MONTAGE * picture.height for picture in shown):
            return blocks
        return [Gallery(shown), *(block for block in blocks if not isinstance(block, Figure))]

    return Section("chromaps", "CHRO-maps", "The colour of a voxel represents its features in the last decoder map: "
                   "similar colours are similar features. Colours are comparable between cases of one model, not "
                   "between models.", "An organ has one colour in all slices, patients and scanners.",
                   attempt(show, "No CHRO-maps could be computed"))


def _found_maps(fold: FoldFolder, named: Path | None) -> dict[str, Path]:
    """Find existing CHRO-maps: case -> picture."""
    if named is not None and not named.is_dir():
        raise UserError(f"{named} is not a folder, expected a folder of CHRO-maps", "correct the path after --chromap")
    places = [fold.place.folder / VALIDATION / "chromap"] if named is None else [named, named / "chromap"]
    for place in places:
        if files := sorted(place.glob("*.png")):
            return {file.stem: file for file in evenly(files, MAPS)}
    if named is not None:
        raise UserError(f"{named} has no CHRO-maps, expected files CASE.png", "correct the path after --chromap")
    return {}


def _further(number: int, folder: Path, most_width: int) -> Section:
    def show() -> Sequence[Block]:
        metrics = read_metrics(folder)
        return [Details("Metrics", metrics_blocks(metrics, metrics.methods, most_width), is_open=True)]

    return Section(f"evaluation{number + 1}", folder.resolve().name, "Evaluation of other masks.", "",
                   attempt(show, "The evaluation cannot be shown"))


def render(parts: Sequence[Chapter]) -> str:
    """Render the page; the template escapes all texts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nnunet_cfcl.evaluation.report", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    title = parts[0].title if len(parts) == 1 or parts[0].key != "comparison" else "Comparison of trainings"
    page = environment.get_template(TEMPLATE).render(
        chapters=parts, title=title, version=nnunet_cfcl.__version__, created=f"{datetime.now():%Y-%m-%d %H:%M}")
    # JSON and file names may contain lone surrogates, which cannot be encoded
    return page.encode("utf-8", errors="replace").decode("utf-8")
