"""Keep the figures of chosen benchmark runs in benchmarks/figures.json, from which the site and the README take theirs.

    python scripts/collect_figures.py benchmarks/results/pool-*.json

`make bench` writes one file per run into benchmarks/results/. The files that are named here replace all that
figures.json has of the same tool; where two of them have the same measure, the later file counts.
"""
import argparse
import json
import math
import sys
from pathlib import Path

FIGURES = Path(__file__).resolve().parent.parent / 'benchmarks' / 'figures.json'
KEPT = ('unit', 'times', 'target', 'met', 'note')


def rounded(value: float) -> float | str:
    "Four digits: what is behind them is noise. JSON has no infinity, so that is a word."
    return float(f'{value:.4g}') if math.isfinite(value) else 'infinite'


def row_of(row: dict) -> dict:
    "A line of the table: median, least, most and number of rounds instead of the single values."
    values = row['values']
    facts = dict(who=row['who'], median=rounded(row['median']), least=rounded(min(values)), most=rounded(max(values)), rounds=len(values))
    if row.get('by_processor') is not None: facts['by_processor'] = rounded(row['by_processor'])
    return facts | {key: rounded(row[key]) if key == 'times' else row[key] for key in KEPT if row.get(key) not in (None, '')}


def collect(paths: list) -> dict:
    "tool -> measure -> machine and rows, of files in the order of their names, which is that of their times."
    tools = {}
    for path in sorted(paths, key=lambda path: path.name):
        run, measures = json.loads(path.read_text(encoding='utf-8')), tools.setdefault(path.name.partition('-')[0], {})
        for name in dict.fromkeys(row['measure'] for row in run['rows']):
            measures[name] = dict(machine=run['machine'], rows=[row_of(row) for row in run['rows'] if row['measure'] == name])
    return tools


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', nargs='+', type=Path, help='files that `make bench` wrote')
    tools = collect(parser.parse_args().results)
    kept = json.loads(FIGURES.read_text(encoding='utf-8')) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps(kept | tools, indent=1, ensure_ascii=False, allow_nan=False) + '\n', encoding='utf-8')
    for tool, measures in tools.items(): print(f'{tool:8} {len(measures)} measures, {sum(len(each["rows"]) for each in measures.values())} figures')
    return 0


if __name__ == '__main__': sys.exit(main())
