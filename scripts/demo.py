"""The main job from end to end: drum performances -> a model trained in four shards -> its figures -> new grooves.

Everything lands in demo/. Run it again and it takes up where it stopped; a different corpus starts a new run.
"""
import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / 'demo'
GROOVE_MIDI = ROOT.parent / 'shared/data/groove_midi'
SHARDS = 4
TRAINING = ['--drum-map', 'pitch', '--order', '8', '--min-bytes', '0', '--min-notes', '1', '--save-every', '200', '--resume']


def groove(*arguments: object, quiet: bool = False) -> str:
    "Run `python -m datatools.groove` with `arguments`, show the command, and return what it prints."
    words = [str(a.relative_to(ROOT) if isinstance(a, Path) else a) for a in arguments]
    print('\n$ python -m datatools.groove', *words, flush=True)
    done = subprocess.run([sys.executable, '-m', 'datatools.groove', *words], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)
    if not quiet or done.returncode: print(done.stdout, end='', flush=True)
    if done.returncode: raise SystemExit(f'the command above failed with exit code {done.returncode}')
    return done.stdout


def corpus(data: Path | None) -> Path:
    "The folder of MIDI files to train on: the one asked for, Groove MIDI beside the project, or a synthetic one."
    if data is not None:
        if not data.is_dir(): raise SystemExit(f'--data: {data} is not a folder; name a folder of MIDI files')
        return data.resolve()
    if GROOVE_MIDI.is_dir(): return GROOVE_MIDI
    from datatools.testing import write_drum_corpus
    synthetic = OUT / 'synthetic'
    write_drum_corpus(synthetic, 200)  # the same bytes every time
    return synthetic


def split(folder: Path) -> tuple[list[Path], list[Path]]:
    "Training and held-out files: the official split where info.csv has one, else every tenth file is held out."
    info = folder / 'info.csv'
    if info.exists():
        with info.open(newline='', encoding='utf-8') as file: rows = list(csv.DictReader(file))
        if rows and {'split', 'midi_filename'} <= rows[0].keys():
            return tuple(sorted(folder / r['midi_filename'] for r in rows if r['split'] == name)
                         for name in ('train', 'test'))
    files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in {'.mid', '.midi'})
    if len(files) < 10: raise SystemExit(f'{folder} has {len(files)} MIDI files; the demo needs at least 10')
    return [p for i, p in enumerate(files) if i % 10], files[::10]


def prepare(folder: Path) -> tuple[Path, Path]:
    "Write the two lists of files; results of a run over anything else are removed first."
    train, held_out = split(folder)
    asked = json.dumps({'data': str(folder), 'training': TRAINING, 'files': [len(train), len(held_out)]}, indent=1)
    record = OUT / 'run.json'
    if record.exists() and record.read_text(encoding='utf-8') != asked:
        print('demo/ holds a run over something else: starting afresh')
        for path in OUT.iterdir():
            if path.name == 'synthetic': continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    OUT.mkdir(exist_ok=True)
    record.write_text(asked, encoding='utf-8')
    lists = OUT / 'train.txt', OUT / 'held_out.txt'
    for path, files in zip(lists, (train, held_out)):
        path.write_text(''.join(f'{file}\n' for file in files), encoding='utf-8')
    print(f'{len(train)} files to train on, {len(held_out)} held out, from {folder}')
    return lists


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, help='a folder of MIDI files (default: Groove MIDI in ../shared, else synthetic)')
    train, held_out = prepare(corpus(parser.parse_args().data))
    parts = [OUT / f'part{k}.groove' for k in range(SHARDS)]
    for k, part in enumerate(parts):
        groove('train', '--from-filelist', train, '-o', part, '--shard-index', k, '--num-shards', SHARDS,
               '--checkpoint-dir', OUT / f'checkpoints{k}', *TRAINING)
    model, grooves = OUT / 'model.groove', OUT / 'groove.mid'
    groove('merge', *parts, '-o', model)
    figures = json.loads(groove('eval', model, '--from-filelist', held_out, '--json', quiet=True))
    (OUT / 'eval.json').write_text(json.dumps(figures, indent=1) + '\n', encoding='utf-8')
    groove('sample', model, '-l', 8, '-n', 4, '--seed', 1, '--temperature', 0.95, '--out-midi', grooves)
    print('\nResults in demo/', f'  model      {model.relative_to(ROOT)}',
          '  held out   ' + ', '.join(f'{k} {v:.3f}' for k, v in figures.items() if isinstance(v, float)),
          *(f'  groove     {p.relative_to(ROOT)}' for p in sorted(OUT.rglob('*.mid')) if 'synthetic' not in p.parts), sep='\n')


if __name__ == '__main__': main()
