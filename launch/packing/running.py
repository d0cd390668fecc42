"""A packing from its options to shards that are there, by any function that makes shards, such as one on Ray Data."""

from __future__ import annotations

import glob
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gen_dist.config.addresses import shown
from gen_dist.data.losses import KINDS
from gen_dist.data.naming import printable
from gen_dist.data.packing import SECONDS_BEFORE_PROGRESS
from gen_dist.data.shards.contents import ENDS, LeftOut
from gen_dist.data.shards.fetching import Fetcher, is_url
from gen_dist.data.shards.labels import INTEGER
from gen_dist.data.shards.writing import CLASS_KEY, PLAN_FILE, index_place
from gen_dist.data.sources.source import SPLITS
from gen_dist.errors import DataError, agreeing, number_of
from gen_dist.launch.packing.making import Report, index_of, make_shard
from gen_dist.launch.packing.options import PackOptions, ShardOptions
from gen_dist.launch.packing.plan import LabelNames, ShardPlan, ShardTask, Tasks, plan_shards
from gen_dist.records.reading import COUNT, TEXT, Kind, list_of, parsed_object, values_of

_REPORTS = "reports"
_NAMES_SHOWN = 3
_PLAN = {"key": TEXT, "source": TEXT}
_COUNTED = values_of(
    Kind(
        "a count and what is counted",
        lambda value: isinstance(value, list) and len(value) == 2 and COUNT.fits(value[0]),
    )
)
_REPORT = {
    **{"name": TEXT, "images": COUNT, "bytes": COUNT, "sha256": TEXT, "labels": list_of(TEXT)},
    **{"left_out": _COUNTED, "losses": _COUNTED, "changes": values_of(COUNT), "kinds": values_of(COUNT)},
}
"""Fields of a report, in JSON."""


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to make any shard of a packing."""

    source: str
    labels: LabelNames
    options: ShardOptions
    out: str
    """Absolute path or URL of the directory of the shards."""

    def make(self, task: ShardTask) -> Report:
        """Make a shard and write it, then its report: a shard with a report is whole.

        Raises:
            DataError: see `make_shard`; or the place cannot be written to.
        """
        reader = Fetcher(self.source, _silent)
        writer = Fetcher(self.source, _silent, verb="write")
        content, report = make_shard(self.source, task, self.labels, self.options, reader)
        place = f"{self.out}/{report.name}"
        writer.write(place, content)
        writer.write(index_place(place), index_of(report, content))
        writer.write(_report_place(self.out, report.name), json.dumps(asdict(report)).encode())
        return report


Runner = Callable[[Job, Tasks], Iterator[Report]]
"""Function that makes shards in any order and gives the report of each as it is done."""


def pack(options: PackOptions, run: Runner, announce: Callable[[str], None]) -> None:
    """Pack a source into shards. Shards that an earlier call has finished are not made again.

    Args:
        options: source, place, and how.
        run: maker of the shards.
        announce: takes lines for the user.

    Raises:
        DataError: the source or the place cannot be used, or the place has shards of something else; one line.
    """
    out = place_of(options.out)
    plan = plan_shards(options.source, options.packing(), options.images_per_shard, announce)
    if options.container == "tar":
        _refuse_numbers(plan)
    for remark in plan.remarks:
        announce(f"{plan.source}: {remark}")
    own = {field.name for field in fields(ShardOptions)}
    of_shards = ShardOptions(**{name: getattr(options, name) for name in own})
    names = [task.file_name(options.container) for task in plan.tasks]
    _claim(out, plan, of_shards, names)
    reports = _finished(out, names, plan.source)
    if reports:
        announce(
            f"{len(reports):,} of {number_of(len(names), 'shard')} {agreeing(len(reports), 'are')} finished in "
            f"{printable(shown(out))}"
        )
    missing = plan.tasks.only(name not in reports for name in names)
    bar = tqdm(
        total=len(names),
        initial=len(reports),
        desc=f"packing {plan.source}",
        unit=" shards",
        delay=SECONDS_BEFORE_PROGRESS,
        disable=None,
    )
    with bar:
        for report in run(Job(plan.source, plan.labels, of_shards, out), missing) if missing else ():
            reports[report.name] = report
            bar.update()
    for line in _lines(plan, [reports[name] for name in names], out, options):
        announce(line)


def in_this_process(job: Job, tasks: Sequence[ShardTask]) -> Iterator[Report]:
    """Make shards one after another: the twin of what a cluster does."""
    return map(job.make, tasks)


def place_of(out: str) -> str:
    """Absolute path, or URL, of a directory that is written to."""
    return out.rstrip("/") if is_url(out) else str(Path(out).expanduser().absolute())


def _silent(_line: str) -> None:
    pass


def _report_place(out: str, name: str) -> str:
    return f"{out}/{_REPORTS}/{name}.json"


def _refuse_numbers(plan: ShardPlan) -> None:
    """Raise DataError for classes whose names are other numbers than 0, 1, ...: readers of tar files count by them."""
    names = plan.labels.classes or ()
    if all(map(INTEGER.fullmatch, names)) and set(names) != set(map(str, range(len(names)))):
        raise DataError(
            f"{plan.source}: classes are called {', '.join(map(printable, names[:3]))}, and in tar files a label that "
            f"is a number is that of the class, from 0 to {len(names) - 1}; use --container parquet, which names them"
        )


def _claim(out: str, plan: ShardPlan, options: ShardOptions, names: Sequence[str]) -> None:
    """Take a place for a packing, whose shards have these names.

    Raises:
        DataError: it has shards of another source or of other options, or files that no packing of ours wrote.
    """
    key = plan.key([asdict(options)])
    content = _content(plan.source, f"{out}/{PLAN_FILE}")
    known = None if content is None else _parsed(content, _PLAN)
    if known is not None and known["key"] == key:
        return
    fetcher = Fetcher(plan.source, _silent)
    if known is None:
        there = {place.rpartition("/")[2] for place in fetcher.glob(f"{glob.escape(out)}/*")}
        if content is not None:
            raise DataError(f"{printable(shown(out))}/{PLAN_FILE} is no plan of a packing; give an empty --out")
        if taken := sorted(there & {*names, _REPORTS}):
            raise DataError(
                f"{printable(shown(out))} has {taken[0]} and no {PLAN_FILE}, so it need not be of a packing; give an "
                "empty --out"
            )
    elif fetcher.glob(_report_place(glob.escape(out), "*")):  # one that made nothing gives way
        raise DataError(
            f"{printable(shown(out))} has shards of another packing: of {printable(known['source'])}, whose files have "
            "changed, or of other options; give an empty --out"
        )
    facts = {"key": key, "source": plan.source, "shards": len(plan.tasks), "options": asdict(options)}
    Fetcher(plan.source, _silent, verb="write").write(f"{out}/{PLAN_FILE}", json.dumps(facts, indent=1).encode())


def _finished(out: str, names: Sequence[str], source: str) -> dict[str, Report]:
    """Reports of the shards that are there, by name. A shard with a damaged report is made again."""
    fetcher = Fetcher(source, _silent)

    def of_shard(name: str) -> Report | None:
        content, place = _content(source, _report_place(out, name)), f"{out}/{name}"
        found = None if content is None else _parsed(content, _REPORT)
        if found is None or not fetcher.exists(place) or fetcher.facts(place).size != found["bytes"]:
            return None
        return Report(**{field: found[field] for field in _REPORT})

    with fetcher.threads() as pool:
        reports = pool.map(of_shard, names)
        return {name: report for name, report in zip(names, reports, strict=True) if report}


def _content(source: str, place: str) -> bytes | None:
    """Content of a file; None if there is none."""
    fetcher = Fetcher(source, _silent)
    if not fetcher.exists(place):
        return None
    return fetcher.read(place, 0, fetcher.facts(place).size)


def _parsed(content: bytes, shape: Mapping[str, Kind]) -> dict[str, Any] | None:
    """JSON object of this shape; None if it is none."""
    try:
        return parsed_object(content, shape)
    except ValueError:
        return None


def _lines(plan: ShardPlan, reports: Sequence[Report], out: str, options: PackOptions) -> Iterator[str]:
    """Summary of a packing, with the options that train on it."""
    total = sum(report.images for report in reports)
    size = sum(report.bytes for report in reports)
    yield (
        f"packed {plan.source}: {number_of(total, 'image')} in {number_of(len(reports), 'shard')} of "
        f"{size / 2**20:,.1f} MiB in all, in {printable(shown(out))}"
    )
    ends = LeftOut()
    for why in dict.fromkeys(why for report in reports for why in report.left_out):
        left = [report.left_out[why] for report in reports if why in report.left_out]
        if why in ENDS:
            for shard in (shard for _, shards in left for shard in shards):
                ends.add(shard, {why: 1})
            continue
        names = [name for _, some in left for name in some][:_NAMES_SHOWN]
        yield f"left out {number_of(sum(count for count, _ in left), 'image')}, {why}: {', '.join(names)}"
    yield from ends.lines("left out")
    changes = _sums(report.changes for report in reports)
    if changes:
        yield "; ".join(f"{count:,} {agreeing(count, change)}" for change, count in changes.items())
    for kind, count in _sums({kind: one[0] for kind, one in report.losses.items()} for report in reports).items():
        yield f"{number_of(count, 'image')} {agreeing(count, KINDS[kind])}"
    kinds = _sums(report.kinds for report in reports)
    if len(kinds) > 1:
        counted = " and ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        yield f"warning: images are {counted}, and training takes one kind; --dtype uint8 makes it one type"
    words = []
    for split in SPLITS:
        count = sum(report.name.startswith(f"{split}-") for report in reports)
        if count:
            number = f"{{00000..{count - 1:05}}}" if count > 1 else "00000"
            words.append(f"{out}/{split}-{number}.{options.container}")
    tested = f" --test-shards {_quoted(words[1])}" if len(words) > 1 else ""
    if (names := reports[0].labels) not in ([], [CLASS_KEY]):
        tested += f" --label-columns {shlex.join(names)}"
    if options.missing_labels != "refuse":
        tested += f" --missing-labels {options.missing_labels}"
    yield f"train on it with --data {_quoted(f'shards:{words[0]}')}{tested}"


def _quoted(word: str) -> str:
    """A word of a shell's command in single quotes, on one line."""
    return "'" + printable(word).replace("'", "'\\''") + "'"


def _sums(counts: Iterator[Mapping[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for of_one in counts:
        for name, count in of_one.items():
            sums[name] = sums.get(name, 0) + count
    return sums
