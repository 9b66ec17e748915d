"""Write the parameter sets for Surge XT from the table of its parameters. With --check, only say whether they are in step."""
import argparse
import os
import sys
import tempfile
from pathlib import Path

from datatools.core import read_json
from datatools.vst.params import Categorical, Continuous, NoteTimes, ParamSpec, Pitch

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get('DATATOOLS_TEST_DATA') or ROOT.parent / 'shared/data')
COMMENT = '''{count} parameters of Surge XT, by the names that pedalboard gives them.
Facts read from the published configuration of the synth-permutations study (Hayes et al., MIT licence).
Written by scripts/make_surge_specs.py.'''
MINIMUM_LENGTH = 0.05  # seconds; the study has none, and a shorter note only costs another draw


def parameter(entry: dict) -> Continuous | Categorical:
    "One row of the table."
    if entry['kind'] == 'categorical':
        return Categorical(entry['name'], entry['values'], entry['raw_values'], entry.get('weights'), entry['encoding'])
    return Continuous(entry['name'], entry['min'], entry['max'], entry.get('constant_val_p', 0.0), entry.get('constant_val', 0.0))


def spec(name: str, table: dict) -> ParamSpec:
    "The set for one part of the table; its length must be the one that the table states."
    pitch, times = table['note']
    made = ParamSpec(name, [parameter(entry) for entry in table['synth']],
        [Pitch(pitch['min'], pitch['max']), NoteTimes(times['max_note_duration_seconds'], MINIMUM_LENGTH)])
    if made.encoded_length != table['encoded_length']: raise SystemExit(f'{name}: encoded length {made.encoded_length}, not {table["encoded_length"]}')
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--table', type=Path, default=DATA / 'surge_xt_parameters.json', help='the table of parameters, JSON')
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a set is not what the table gives')
    options = parser.parse_args()
    tables, stale = read_json(options.table), []
    for part in ('full', 'simple'):
        made, target = spec(f'surge_{part}', tables[part]), ROOT / f'datatools/vst/data/surge_{part}.yaml'
        with tempfile.TemporaryDirectory() as folder:
            fresh = Path(folder) / target.name
            made.to_yaml(fresh if options.check else target, COMMENT.format(count=len(made)))
            if options.check and not (target.exists() and target.read_bytes() == fresh.read_bytes()): stale.append(target.name)
    if stale: print('not what the table gives (run scripts/make_surge_specs.py):', *stale, sep='\n  ')
    return 1 if stale else 0


if __name__ == '__main__': sys.exit(main())
