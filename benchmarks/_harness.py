"""What the benchmarks share: contestants timed in turns, one table, the machine they ran on."""
import argparse
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'


def say(text):
    "Tell what is going on, on the error stream: the table alone is the output"
    print(f'[{time.strftime("%H:%M:%S")}] {text}', file=sys.stderr, flush=True)


def machine():
    "Processor, cores, memory, load and versions, for the head of a table"
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    model = next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), platform.processor() or 'unknown')
    return dict(cpu=model, cores=os.cpu_count(), load=[round(each, 2) for each in os.getloadavg()], python=platform.python_version(),
        system=platform.platform(), date=time.strftime('%Y-%m-%d %H:%M'))


def processor_seconds():
    "Processor time of this process and of its children that have ended: other people's jobs do not count"
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


class Times(NamedTuple):
    "Seconds, one per round"
    wall: list
    processor: list

    def rates(self, amount): return Times([amount / each for each in self.wall], [amount / max(each, 1e-9) for each in self.processor])


def in_turns(contestants, rounds):
    """Seconds of each contestant (name -> function), one round after the other: what disturbs one disturbs all.
    A contestant is a function or a pair (function, rounds), the latter for slow ones. Returns name -> Times."""
    seconds = {name: Times([], []) for name in contestants}
    for turn in range(rounds):
        for name, each in contestants.items():
            run, most = each if isinstance(each, tuple) else (each, rounds)
            if turn >= most: continue
            wall, processor = time.perf_counter(), processor_seconds()
            run()
            seconds[name].wall.append(time.perf_counter() - wall)
            seconds[name].processor.append(processor_seconds() - processor)
    return seconds


@dataclass
class Row:
    "A line of the table"
    measure: str            # lines of one measure stand together
    who: str
    values: object          # Times, by wall clock and by processor time; or a list of other figures
    unit: str = ''
    ours: float = None      # our median on the same input, where more is better: the ratio is printed
    times: float = None     # the ratio itself
    target: str = ''
    met: bool = None        # None where there is no target
    note: str = ''
    median: float = field(init=False)
    by_processor: float = field(init=False, default=None)

    def __post_init__(self):
        if isinstance(self.values, Times): self.values, processor = self.values
        else: processor = []
        self.median = statistics.median(self.values)
        if processor: self.by_processor = statistics.median(processor)
        if self.ours is not None: self.times = self.ours / self.median
        if self.met is not None: self.met = bool(self.met)


def figure(value):
    "A number in five places or fewer"
    if value != value or value in (float('inf'), float('-inf')): return str(value)
    if abs(value) >= 1e6: return f'{value / 1e6:.4g} M'
    if value == int(value): return f'{int(value):,}'
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def show(rows, facts):
    "Print the table"
    print(f'{facts["cpu"]}, {facts["cores"]} cores, load {" ".join(map(str, facts["load"]))} at the start, Python {facts["python"]}, {facts["date"]}\n')
    head = ('', 'median', 'least … most', 'n', 'by processor', 'times', 'target', 'met')
    lines, at = [], None
    for row in rows:
        if row.measure != at: lines.append([row.measure])
        at = row.measure
        spread = f'{figure(min(row.values))} … {figure(max(row.values))}' if len(row.values) > 1 else ''
        ratio = '' if row.times is None else f'{figure(row.times)}x'
        met = '' if row.met is None else 'yes' if row.met else 'NO'
        processor = '' if row.by_processor is None else figure(row.by_processor)
        lines.append([f'  {row.who}', f'{figure(row.median)} {row.unit}'.strip(), spread, str(len(row.values)), processor, ratio, row.target, met, row.note])
    width = [max(len(line[column]) for line in [head, *lines] if len(line) > 1) for column in range(len(head))]
    def layout(line): return '  '.join(cell.ljust(size) for cell, size in zip(line, [*width, 0])).rstrip()
    print(layout(head))
    for line in lines: print(('\n' if len(line) == 1 else '') + layout(line))
    print('\ntimes: how many times better ours is. n: rounds, in turns with the others of the same measure.\nby processor: the same figure by the processor time of this process and its children instead of the wall clock; other people\'s jobs slow it less.', flush=True)


def save(name, rows, facts):
    "Keep the figures as JSON"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f'{name}-{time.strftime("%Y%m%d-%H%M%S")}.json'
    path.write_text(json.dumps(dict(machine=facts, rows=[asdict(row) for row in rows]), indent=1, default=float))
    say(f'figures in {path.relative_to(ROOT)}')


def run(tool, description, measures, footnotes=dict):
    "The command line of a benchmark: `measures` are functions of a folder and whether to be quick, by name; `footnotes()` gives what was left out"
    parser = argparse.ArgumentParser(prog=f'python -m benchmarks.{tool}', description=description.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('--quick', action='store_true', help='small data and few rounds')
    parser.add_argument('--only', action='append', choices=measures, metavar='NAME', help=f'one of {", ".join(measures)}; may be given several times')
    parser.add_argument('--place', type=Path, help='folder for temporary files, on the disk to be measured; the system\'s by default')
    options = parser.parse_args()
    facts, rows = machine(), []
    say(f'{facts["cpu"]}, {facts["cores"]} cores, load {facts["load"]}')
    for name in options.only or measures:
        say(name)
        with tempfile.TemporaryDirectory(prefix=f'{tool}-{name}-', dir=options.place) as place: rows += measures[name](Path(place), options.quick)
    show(rows, facts)
    for name, reason in footnotes().items(): print(f'left out: {name}: {reason}')
    save(tool, rows, facts)
    missed = [row for row in rows if row.met is False]
    print(f'\n{sum(row.met is True for row in rows)} targets met, {len(missed)} missed' + ''.join(f'\n  missed: {row.measure}: {row.who.strip()}, {row.target}' for row in missed))
