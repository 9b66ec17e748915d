"""The groove command line: every flag does what its help says, every error is one line, and no list and no file brings it down."""
import csv
import hashlib
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mido
import numpy as np
import pytest
import symusic
from typer.testing import CliRunner

from datatools.arrays import ArrayFile
from datatools.cli import app as whole_app
from datatools.groove.__main__ import app
from datatools.groove.files import Skip
from datatools.groove.midi import read_drums
from datatools.groove.model import GrooveModel
from datatools.groove.stores import read_order_shards
from datatools.testing import write_drum_corpus

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ['train', 'merge', 'sample', 'eval', 'stats', 'info', 'verify', 'export']


def sha(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def command(*arguments, code=0, stdout_only=False, **options):
    "Run the command line in this process; what it printed, errors included"
    for handler in list(logging.getLogger().handlers): logging.getLogger().removeHandler(handler)  # each call has an error stream of its own
    done = CliRunner().invoke(app, list(map(str, arguments)), **options)
    if done.exception is not None and not isinstance(done.exception, SystemExit): raise done.exception
    assert done.exit_code == code, done.output
    if code: assert not done.stdout and (done.stderr.startswith('Error: ') and done.stderr.count('\n') == 1 or code == 2 and done.stderr.startswith('Usage: ')), done.stderr
    return done.stdout if stdout_only else done.output


def train(*arguments, **options): return command('train', *arguments, '--log-every', 0, **options)
def as_json(*arguments, **options): return json.loads(command(*arguments, '--json', stdout_only=True, **options))
def skipped(model): return [json.loads(line) for line in Path(f'{model}.skipped.jsonl').read_text('utf-8').splitlines()]


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    "Twelve loops with metadata"
    folder = tmp_path_factory.mktemp('corpus')
    write_drum_corpus(folder, 12)
    return folder


@pytest.fixture
def quick(tmp_path):
    "A directory in memory where there is one: thousands of fsyncs cost nothing there"
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else tmp_path) as folder: yield Path(folder)


@pytest.fixture(scope='session')
def model(corpus, tmp_path_factory):
    "A model with styles"
    path = tmp_path_factory.mktemp('model')/'groove.model'
    train(corpus, '-o', path, '--aux-key', 'style')
    return path


# Usage

def test_both_names_of_the_program(model, python):
    "`python -m datatools.groove` and `datatools groove` are one; exit codes and streams are those of a real process"
    script = [Path(sys.executable).with_name('datatools'), 'groove'] if Path(sys.executable).with_name('datatools').exists() else [sys.executable, '-c', 'from datatools.cli import main; main()', 'groove']
    def outcomes(*arguments):
        done = [subprocess.run([*map(str, start), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT) for start in (script, [sys.executable, '-m', 'datatools.groove'])]
        return [(each.returncode, each.stdout, each.stderr) for each in done]
    first, second = outcomes('info', model, '--json')
    assert first == second and first[0] == 0 and json.loads(first[1])['kind'] == 'groove model' and not first[2]
    first, second = outcomes('info', 'nowhere')
    assert first == second == (2, '', "Error: MODEL='nowhere' is not allowed: it must be a file or directory that exists.\n")


@pytest.mark.parametrize('name', COMMANDS)
def test_help_and_unknown_flags(name):
    text = command(name, '--help')
    assert 'Usage: ' in text and re.findall(r'--[a-z-]+', text)
    assert CliRunner().invoke(whole_app, ['groove', name, '--help']).output.splitlines()[1:] == text.splitlines()[1:]
    assert 'No such option' in command(name, '--nonsense', code=2)
    for flag in {flag for flag in re.findall(r'(--[a-z][a-z-]{5,}) ', text)} - {'--help'}:
        assert 'No such option' in command(name, flag[:-2], code=2), f'{flag[:-2]} must not stand for {flag}'


def test_usage_errors(corpus, model, tmp_path):
    for arguments in (['bogus'], ['train'], ['train', corpus], ['train', '-o', tmp_path/'m'], ['train', corpus, '--from-filelist', '-', '-o', tmp_path/'m'],
            ['train', tmp_path/'none', '-o', tmp_path/'m'], ['train', '--from-filelist', tmp_path/'none', '-o', tmp_path/'m'], ['train', '--from-filelist', tmp_path, '-o', tmp_path/'m'],
            ['merge', '-o', tmp_path/'m'], ['sample'], ['eval', model], ['eval', model, tmp_path/'none'], ['export', model]):
        command(*arguments, code=2)
    for flags in (['--order', 0], ['--order', 17], ['--order', 'x'], ['--drum-map', 8], ['--resolution', 0], ['--resolution', 25], ['--beats-per-bar', 0], ['--beats-per-bar', 13],
            ['--train-mode', 'x'], ['--store', 'x'], ['--train-mode', 'memory', '--store', 'sqlite'], ['--train-mode', 'stream', '--store', 'memory'], ['--hash-buckets', 3],
            ['--max-rows-per-shard', 0], ['--max-ram-mb', 1], ['--n-jobs', 0], ['--save-every', -1], ['--log-every', -1], ['--gc-every', -1], ['--min-bytes', -1], ['--min-notes', 0],
            ['--shard-index', 1], ['--shard-index', -1], ['--num-shards', 0], ['--aux-csv', 'x.csv'], ['--aux-key', ''], ['--max-files', -1], ['--resume-from', tmp_path/'none']):
        command('train', corpus, '-o', tmp_path/'m', *flags, code=2)
    for flags in (['-l', 10**15], ['-n', 10**15]): assert 'emory' in command('sample', model, *flags, code=1)
    for flags in (['-l', 0], ['-n', 0], ['--temperature', 0], ['--temperature', 'nan'], ['--temperature-end', -1], ['--top-k', -1], ['--top-p', 0], ['--top-p', 1.5], ['--novelty', 2],
            ['--cond-style', 'polka'], ['--cond-velocity', 0], ['--cond-velocity', 128], ['--out-midi', tmp_path], ['--seed', 1.5]):
        command('sample', model, *flags, code=2)
    assert {path.name for path in tmp_path.iterdir()} <= {'m.checkpoints'}


def test_damaged_models_are_refused(model, corpus, tmp_path):
    content, bad = model.read_bytes(), tmp_path/'model.pkl'
    damaged = dict(missing=None, empty=b'', pickle=pickle.dumps({'a': 1}), text=b'hello', head=content[:30], half=content[:len(content) // 2], short=content[:-1],
        footer=content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], version=content[:8] + b'\7' + content[9:])
    for name, wrong in damaged.items():
        bad.unlink(missing_ok=True) if wrong is None else bad.write_bytes(wrong)
        for arguments in (['info', bad], ['stats', bad], ['sample', bad], ['eval', bad, corpus], ['export', bad, '--arpa', tmp_path/'x.arpa'], ['merge', bad, model, '-o', tmp_path/'x']):
            said = command(*arguments, code=2 if wrong is None else 1)
            assert str(bad) in said and ('pickle' in said.replace(str(bad), '')) == (name == 'pickle'), (name, said)
    assert {path.name for path in tmp_path.iterdir()} <= {'model.pkl'}
    (tmp_path/'model.pkl').write_bytes(content)  # any name holds the one format
    assert command('info', tmp_path/'model.pkl') == command('info', model)


@pytest.mark.parametrize('arguments', [['info'], ['stats'], ['sample'], ['eval'], ['export', '--arpa', 'x.arpa']])
def test_a_flipped_bit_is_noticed(model, corpus, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    content, entry = model.read_bytes(), ArrayFile(model)._entries['ngram/counts']
    (tmp_path/'bad').write_bytes(content[:entry['offset']] + bytes([content[entry['offset']] ^ 1]) + content[entry['offset'] + 1:])
    assert 'checksum' in command(arguments[0], 'bad', *([corpus] if arguments == ['eval'] else []), *arguments[1:], code=1)


# The list

def awkward_list(corpus, folder):
    "A list with everything in it, as bytes, and what the skip report must say about the lines that hold a name"
    loops = sorted(corpus.glob('*.mid'))
    names = [b'white space .mid', 'größe 太鼓.mid'.encode(), b'not utf-8 \xff\xfe.mid', b'tab\tand "quotes" \'.mid', b'-o.mid']
    for name, loop in zip(names, loops): shutil.copy(loop, os.path.join(os.fsencode(folder), name))
    os.mkdir(folder/'directory.mid')
    os.mkfifo(folder/'pipe.mid')
    (folder/'small.mid').write_bytes(loops[0].read_bytes()[:700])
    (folder/'loop').symlink_to('loop')
    lines = [*((b'%s/%s' % (os.fsencode(folder), name), None) for name in names), (os.fsencode(folder/'missing.mid'), 'missing'), (os.fsencode(folder/'directory.mid'), 'directory'),
        (os.fsencode(folder/'pipe.mid'), 'unreadable'), (b'/dev/zero', 'unreadable'), (os.fsencode(folder/'loop'), 'unreadable'), (b'x' * 5000, 'unreadable'),
        (os.fsencode(folder/'small.mid/below.mid'), 'missing'), (b'%s/./%s' % (os.fsencode(folder), names[0]), 'duplicate'), (b'%s/%s' % (os.fsencode(folder), names[1]), 'duplicate'),
        (os.fsencode(folder/'small.mid'), 'below_min_bytes')]
    content = b'\xef\xbb\xbf' + b''.join(name + (b'\r\n' if i % 2 else b'\n') + (b'\r\n  \n\n' if i % 3 else b'') for i, (name, _) in enumerate(lines))
    return content.rstrip(b'\r\n'), [(i, name, reason) for i, (name, reason) in enumerate(lines) if reason]


def test_awkward_lists(corpus, tmp_path):
    "CRLF, blank lines, a byte order mark, no last newline, and names of all kinds; from a file and from standard input"
    content, expected = awkward_list(corpus, tmp_path)
    (tmp_path/'list').write_bytes(content)
    summary = as_json('train', '--from-filelist', tmp_path/'list', '-o', tmp_path/'m', '--log-every', 0)
    assert (summary['processed'], summary['kept']) == (15, 5)
    report = skipped(tmp_path/'m')
    assert [(line['index'], line['reason']) for line in report] == [(i, reason) for i, _, reason in expected]
    assert [line['path'] for line in report] == [name.decode('utf-8', 'backslashreplace') for _, name, _ in expected]
    assert sum(summary['skipped'].values()) == 10 and summary['skipped']['duplicate'] == 2
    train('--from-filelist', '-', '-o', tmp_path/'n', input=content)
    assert sha(tmp_path/'m') == sha(tmp_path/'n')
    train('--from-filelist', '-', '-o', tmp_path/'n', '--n-jobs', 2, input=content)
    assert sha(tmp_path/'m') == sha(tmp_path/'n')
    assert sum(as_json('eval', tmp_path/'m', '--from-filelist', tmp_path/'list')['skipped'].values()) == 10  # the duplicates, and the small file, which is truncated


def test_standard_input_of_a_process(corpus, tmp_path, python):
    names = '\n'.join(map(str, sorted(corpus.glob('*.mid'))))
    done = python('-m', 'datatools.groove', 'train', '--from-filelist', '-', '-o', tmp_path/'m', '--no-progress', '--log-every', 5, '--mem-stats', '--save-every', 5, input=names)
    assert done.returncode == 0 and 'peak rss bytes' in done.stdout, done.stderr
    log = done.stderr.splitlines()
    assert [line.split(' files, ')[0] for line in log] == ['5 of 12', '10 of 12'] and all('files/s' in line and 'resident' in line for line in log)
    train(corpus, '-o', tmp_path/'n')
    content = [ArrayFile(tmp_path/name) for name in 'mn']
    assert all(np.array_equal(content[0][name], content[1][name]) for name in content[1])


def test_progress(corpus, tmp_path):
    "A bar when asked for; without a terminal, none unless asked for"
    for flags, bar in ((['--progress'], True), (['--no-progress'], False), ([], False)):
        done = CliRunner().invoke(app, ['train', str(corpus), '-o', str(tmp_path/'m'), '--log-every', '0', *flags])
        assert done.exit_code == 0 and ('groove: ' in done.stderr and '12/12' in done.stderr) == bar and (bar or not done.stderr)
    assert 'eval: ' in CliRunner().invoke(app, ['eval', str(tmp_path/'m'), str(corpus), '--progress']).stderr


def test_empty_lists(corpus, tmp_path):
    for i, content in enumerate(('', '\n\n', '\ufeff\r\n')):
        assert as_json('train', '--from-filelist', '-', '-o', tmp_path/f'{i}', '--log-every', 0, input=content)['processed'] == 0
    assert sha(tmp_path/'0') == sha(tmp_path/'1') == sha(tmp_path/'2')
    (tmp_path/'nothing').mkdir()
    train(tmp_path/'nothing', '-o', tmp_path/'m')
    for arguments in (['info'], ['stats'], ['sample']): command(*arguments, tmp_path/'m')
    assert as_json('eval', tmp_path/'m', corpus)['impossible_share'] == 0
    assert 'No drum performance could be read' in CliRunner().invoke(app, ['eval', str(tmp_path/'m'), str(tmp_path/'nothing')]).stderr


def test_directories_are_searched_to_the_bottom(corpus, tmp_path):
    "Upper case and .midi too; nothing else; in the order of their names, wherever the directory is"
    loops = sorted(corpus.glob('*.mid'))
    for i, name in enumerate(('a/b/c/x.MID', 'a/x.midi', 'z.mid', 'a.d/y.Mid')):
        (tmp_path/'c'/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(loops[i], tmp_path/'c'/name)
    shutil.copy(loops[5], tmp_path/'c/no.txt')
    assert as_json('train', tmp_path/'c', '-o', tmp_path/'m', '--log-every', 0)['kept'] == 4
    (tmp_path/'c').rename(tmp_path/'moved')
    train(tmp_path/'moved', '-o', tmp_path/'n')
    assert sha(tmp_path/'m') == sha(tmp_path/'n')


def test_zero_bytes_in_a_list(corpus, tmp_path):
    loops = [os.fsencode(path) for path in sorted(corpus.glob('*.mid'))]
    summary = as_json('train', '--from-filelist', '-', '-o', tmp_path/'m', '--log-every', 0, input=b'\n'.join([b'no\0such file', loops[0], loops[1], loops[0], loops[2]]))
    assert summary['kept'] == 3 and [line['path'] for line in skipped(tmp_path/'m') if line['reason'] == 'duplicate'] == [os.fsdecode(loops[0])]


def test_long_lists(corpus, tmp_path):
    "Longer than any buffer"
    names = [f'{tmp_path}/{"missing " * 9}{i}' for i in range(30_000)] + [str(path) for path in sorted(corpus.glob('*.mid'))]
    for shard in (0, 1): train('--from-filelist', '-', '-o', tmp_path/f'{shard}', '--num-shards', 2, '--shard-index', shard, input='\n'.join(names))
    report = {line['index']: line for shard in (0, 1) for line in skipped(tmp_path/f'{shard}')}
    assert len(report) == 30_000 and all(report[i]['path'] == names[i] and report[i]['reason'] == 'missing' for i in range(30_000))


def test_a_line_break_in_a_file_name(corpus, tmp_path):
    (tmp_path/'c').mkdir()
    shutil.copy(sorted(corpus.glob('*.mid'))[0], tmp_path/'c/line\nbreak.mid')
    assert as_json('train', tmp_path/'c', '-o', tmp_path/'m', '--log-every', 0)['kept'] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_files_without_permission(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path/'c')
    for path in sorted((tmp_path/'c').glob('*.mid'))[:2]: path.chmod(0)
    train(tmp_path/'c', '-o', tmp_path/'m')
    assert [line['reason'] for line in skipped(tmp_path/'m')] == ['unreadable'] * 2


def test_odd_files_all_at_once(shared_data, tmp_path):
    "What is kept was read whole, what is not has its reason"
    folder = shared_data/'midi_odd'
    paths = sorted(path for path in folder.rglob('*') if path.is_file())
    before = {path: sha(path) for path in paths}
    (tmp_path/'list').write_text('\n'.join(map(str, paths)))
    summary = as_json('train', '--from-filelist', tmp_path/'list', '-o', tmp_path/'m', '--min-bytes', 0, '--min-notes', 1, '--drum-map', 'pitch', '--log-every', 0)
    report = {line['path']: line['reason'] for line in skipped(tmp_path/'m')}
    assert summary['processed'] == len(paths) and summary['kept'] == len(paths) - len(report) > 0
    onsets = 0
    for path in paths:
        try: part = read_drums(path.read_bytes())
        except ValueError as error: assert report[str(path)] == str(error).split(':')[0]
        else:
            assert str(path) not in report
            onsets += len(part.tick)
    assert summary['onsets'] + summary['unmapped'] + summary['doubled'] == onsets
    for name, reason in dict(riff_rmi='riff_container', div0='division_zero', fmt2='unsupported_format', fmt7='unsupported_format', ntrks0='no_tracks', smpte_e728='smpte_division', tempo0='tempo_zero',
            ts_num0='bad_time_signature', noEOT='no_end_of_track', chunklen_huge='truncated', sysex_unterminated='truncated', data_byte_first='bad_running_status').items():
        assert report[str(folder/f'synthetic/{name}.mid')] == reason
    assert before == {path: sha(path) for path in paths}


# Filters

def test_filters(corpus, tmp_path):
    loops = sorted(corpus.glob('*.mid'))
    sizes, onsets = [path.stat().st_size for path in loops], [len(read_drums(path.read_bytes()).tick) for path in loops]
    assert as_json('train', corpus, '-o', tmp_path/'m', '--min-bytes', sorted(sizes)[4], '--log-every', 0)['skipped'] == dict(below_min_bytes=sum(size < sorted(sizes)[4] for size in sizes))
    kept = as_json('train', corpus, '-o', tmp_path/'m', '--min-notes', sorted(onsets)[4], '--drum-map', 'pitch', '--log-every', 0)['kept']
    assert kept <= sum(count >= sorted(onsets)[4] for count in onsets) and 0 < kept < 12  # hits on one spot count once
    assert as_json('train', corpus, '-o', tmp_path/'m', '--max-files', 5, '--log-every', 0)['processed'] == 5
    (tmp_path/'tiny.mid').write_bytes(loops[0].read_bytes()[:799])
    (tmp_path/'list').write_text(f'{tmp_path}/tiny.mid\n')
    train('--from-filelist', tmp_path/'list', '-o', tmp_path/'m')
    assert skipped(tmp_path/'m')[0]['reason'] == 'below_min_bytes'  # 800 by default
    mido.MidiFile(tracks=[mido.MidiTrack([mido.Message('note_on', channel=9, note=36, velocity=9, time=100) for _ in range(7)] + [mido.MetaMessage('text', text='x' * 900)])]).save(tmp_path/'tiny.mid')
    train('--from-filelist', tmp_path/'list', '-o', tmp_path/'m')
    assert skipped(tmp_path/'m')[0]['reason'] == 'below_min_notes'  # 8 by default


def test_fail_fast(corpus, tmp_path):
    "Stops at malformed MIDI and nothing else; after mending, --resume goes on to the same bytes"
    shutil.copytree(corpus, tmp_path/'c')
    whole = (tmp_path/'c/loop-0005.mid').read_bytes()
    (tmp_path/'c/loop-0002.mid').write_bytes(b'tiny')
    (tmp_path/'c/loop-0005.mid').write_bytes(whole[:-9])
    for jobs in (1, 2):
        arguments = [tmp_path/'c', '-o', tmp_path/f'm{jobs}', '--n-jobs', jobs]
        said = train(*arguments, '--fail-fast', code=1)
        assert 'loop-0005.mid: truncated' in said and '--resume' in said and not (tmp_path/f'm{jobs}').exists()
    train(*arguments[:1], '-o', tmp_path/'default')
    assert [line['reason'] for line in skipped(tmp_path/'default')] == ['below_min_bytes', 'truncated']
    train(tmp_path/'c', '-o', tmp_path/'m2', '--resume', '--no-fail-fast')
    assert sha(tmp_path/'m2') == sha(tmp_path/'default')
    (tmp_path/'c/loop-0005.mid').write_bytes(whole)
    train(tmp_path/'c', '-o', tmp_path/'m1', '--resume', '--fail-fast')
    train(tmp_path/'c', '-o', tmp_path/'reference')
    assert sha(tmp_path/'m1') == sha(tmp_path/'reference')


# Shards and merging

def test_shards_deal_the_list_round_robin(corpus, tmp_path):
    names = [str(path) for path in sorted(corpus.glob('*.mid'))] + [str(tmp_path/f'missing {i}') for i in range(4)]
    (tmp_path/'list').write_text('\n'.join(names))
    for shard in range(3):
        summary = as_json('train', '--from-filelist', tmp_path/'list', '-o', tmp_path/f'{shard}', '--shard-index', shard, '--num-shards', 3, '--log-every', 0)
        assert summary['processed'] == len(range(shard, 16, 3))
        assert [line['index'] for line in skipped(tmp_path/f'{shard}')] == [i for i in range(12, 16) if i % 3 == shard]
    train('--from-filelist', tmp_path/'list', '-o', tmp_path/'whole')
    assert as_json('merge', *(tmp_path/f'{i}' for i in (2, 0, 1)), '-o', tmp_path/'merged')['complete'] is True
    assert sha(tmp_path/'merged') == sha(tmp_path/'whole') and skipped(tmp_path/'merged') == skipped(tmp_path/'whole')


@pytest.mark.parametrize('shards', [2, 5, 20])
def test_merging_in_any_order_and_nesting(corpus, quick, shards):
    "More shards than files, too; the stores may be mixed"
    train(corpus, '-o', quick/'whole', '--aux-key', 'style')
    parts = [quick/f'{i}' for i in range(shards)]
    for i, part in enumerate(parts):
        train(corpus, '-o', part, '--aux-key', 'style', '--num-shards', shards, '--shard-index', i, '--store', ['memory', 'memmap', 'sqlite'][i % 3], '--hash-buckets', 4 + i)
    command('merge', *parts, '-o', quick/'all')
    command('merge', *reversed(parts), '-o', quick/'reversed')
    command('merge', parts[-1], *parts[1:-1], '-o', quick/'inner')
    assert as_json('info', quick/'inner')['complete'] is False
    command('merge', quick/'inner', parts[0], '-o', quick/'nested')
    for name in ('all', 'reversed', 'nested'): assert sha(quick/name) == sha(quick/'whole') and sha(quick/f'{name}.skipped.jsonl') == sha(quick/'whole.skipped.jsonl')
    assert 'the same files' in command('merge', parts[0], parts[0], '-o', quick/'x', code=1)
    assert 'the same files' in command('merge', quick/'inner', parts[1], '-o', quick/'x', code=1)
    assert 'the same files' in command('merge', quick/'whole', parts[0], '-o', quick/'x', code=1)
    assert not (quick/'x').exists()


def test_merging_other_configurations_is_refused(corpus, tmp_path):
    shard = ['--num-shards', 2, '--shard-index']
    train(corpus, '-o', tmp_path/'a', *shard, 0)
    for flag, value, key in (('--order', 3, 'order'), ('--drum-map', 'pitch', 'drum_map'), ('--resolution', 6, 'resolution'), ('--beats-per-bar', 3, 'beats_per_bar'),
            ('--min-bytes', 801, 'min_bytes'), ('--min-notes', 9, 'min_notes'), ('--aux-key', 'style', 'aux_key')):
        train(corpus, '-o', tmp_path/'b', *shard, 1, flag, value)
        done = CliRunner().invoke(app, ['merge', str(tmp_path/'a'), str(tmp_path/'b'), '-o', str(tmp_path/'x')])
        assert done.exit_code == 1 and f'\n  {key}: ' in done.stderr and not (tmp_path/'x').exists()
    for wrong in (__file__, tmp_path): command('merge', tmp_path/'a', wrong, '-o', tmp_path/'x', code=1)


@pytest.mark.parametrize('store', ['memory', 'memmap', 'sqlite'])
def test_checkpoints_can_be_merged(corpus, tmp_path, store):
    "What an interrupted shard has counted counts; merging leaves it able to go on"
    shutil.copytree(corpus, tmp_path/'c')
    (tmp_path/'c/loop-0005.mid').write_bytes(b'MThd' + bytes(900))
    half = [tmp_path/'c', '-o', tmp_path/'half', '--store', store]
    train(*half, '--fail-fast', code=1)
    checkpoint = tmp_path/'half.checkpoints/shard-0-of-1.checkpoint'
    before = sha(checkpoint)
    assert as_json('merge', checkpoint, '-o', tmp_path/'five') == dict(parts=1, kept=5, onsets=as_json('info', tmp_path/'five')['totals']['onsets'], complete=False, output=str(tmp_path/'five'))
    train(tmp_path/'c', '-o', tmp_path/'first', '--max-files', 5)
    one, other = GrooveModel.load(tmp_path/'five'), GrooveModel.load(tmp_path/'first')
    assert all(np.array_equal(one.tables[name][i], other.tables[name][i]) for name in other.tables for i in (0, 1))
    assert sha(checkpoint) == before and ArrayFile(checkpoint).header['kept'] == 5
    train(*half, '--resume')
    assert as_json('info', tmp_path/'half')['totals']['kept'] == 11


# Stores and representation

def test_stores_and_sizes_change_no_byte(corpus, quick):
    train(corpus, '-o', quick/'m', '--aux-key', 'style')
    variants = [['--store', 'memory'], ['--train-mode', 'memory'], ['--train-mode', 'stream'], ['--store', 'memmap'], ['--train-mode', 'stream', '--store', 'sqlite'], ['--train-mode', 'memory', '--store', 'memory'],
        ['--hash-buckets', 4], ['--store', 'memmap', '--hash-buckets', 4, '--max-rows-per-shard', 7], ['--store', 'sqlite', '--hash-buckets', 5], ['--gc-every', 0], ['--gc-every', 1, '--save-every', 0],
        ['--save-every', 1, '--store', 'memmap'], ['--max-ram-mb', 4000, '--store', 'memmap'], ['--mem-stats'], ['--checkpoint-dir', quick/'elsewhere']]
    for i, variant in enumerate(variants):
        train(corpus, '-o', quick/f'{i}', '--aux-key', 'style', *variant)
        assert sha(quick/f'{i}') == sha(quick/'m'), variant
        if 'stream' in variant and 'sqlite' not in variant: assert (quick/f'{i}.counts/meta.json').exists()
        if 'sqlite' in variant: assert (quick/f'{i}.sqlite').exists()
    assert (quick/'elsewhere').is_dir() and not list(quick.rglob('*.checkpoint')) and not list(quick.rglob('*.run')) and not list(quick.rglob('*.tmp'))


def test_styles_of_every_kind_in_every_store(corpus, quick):
    styles = ['rock', 'a@b', 'x/y', '"quo\'ted \\" one"', 'größe', '😀', '../x', '"line\\nbreak"', '1.5', 'progress', 'ngram', '" blank "']
    shutil.copytree(corpus, quick/'c')
    for path, style in zip(sorted((quick/'c').glob('*.yaml')), styles): path.write_text(f'style: {style}\n', 'utf-8')
    for store in ('memory', 'memmap', 'sqlite'): train(quick/'c', '-o', quick/store, '--aux-key', 'style', '--store', store, '--save-every', 3)
    assert sha(quick/'memory') == sha(quick/'memmap') == sha(quick/'sqlite') and len(GrooveModel.load(quick/'memory').styles) == 12


@pytest.mark.parametrize('styles', [pytest.param(['Rock', 'rock'], id='case'), pytest.param(['"nul \\0"'], id='nul'), pytest.param(['太鼓' * 50], id='long')])
def test_styles_that_are_no_names(corpus, quick, styles):
    shutil.copytree(corpus, quick/'c')
    for i, path in enumerate(sorted((quick/'c').glob('*.yaml'))): path.write_text(f'style: {styles[i % len(styles)]}\n', 'utf-8')
    for store in ('memory', 'memmap', 'sqlite'): train(quick/'c', '-o', quick/store, '--aux-key', 'style', '--store', store)
    assert sha(quick/'memory') == sha(quick/'memmap') == sha(quick/'sqlite')


def test_meta_json(corpus, tmp_path):
    train(corpus, '-o', tmp_path/'m', '--train-mode', 'stream', '--memmap-dir', tmp_path/'counts', '--hash-buckets', 64, '--max-rows-per-shard', 100, '--order', 4)
    meta = json.loads((tmp_path/'counts/meta.json').read_text())
    assert (meta['schema_version'], meta['order'], meta['hash_buckets'], meta['dtype'], meta['max_rows_per_shard'], meta['complete']) == (2, 4, 64, 'uint32', 100, True)
    assert meta['config'] == as_json('info', tmp_path/'m')['config'] and sorted(meta['orders']) == list('1234')
    table = GrooveModel.load(tmp_path/'m').table('ngram')
    _, shards = read_order_shards(tmp_path/'counts', 4)
    assert np.array_equal(np.concatenate([shard['keys'] for shard in shards]), table[0]) and np.array_equal(np.concatenate([shard['counts'] for shard in shards]), table[1])
    assert len(shards) == -(-len(table[1]) // 100) > 1


def test_representation_flags(corpus, tmp_path):
    for flag, value, key in (('--order', 3, 'order'), ('--drum-map', 'pitch', 'drum_map'), ('--drum-map', '9', 'drum_map'), ('--resolution', 6, 'resolution'), ('--beats-per-bar', 3, 'beats_per_bar')):
        train(corpus, '-o', tmp_path/'m', flag, value)
        assert as_json('info', tmp_path/'m')['config'][key] == value
        assert as_json('eval', tmp_path/'m', corpus)['impossible_share'] == 0
    triplets = [mido.Message('note_on', channel=9, note=36 + i % 2 * 2, velocity=90, time=160 if i else 0) for i in range(200)]
    for i in range(3): mido.MidiFile(ticks_per_beat=480, tracks=[mido.MidiTrack(triplets[i:])]).save(tmp_path/f'{i}.mid')
    assert as_json('train', tmp_path, '-o', tmp_path/'m', '--auto-res', '--min-bytes', 1, '--log-every', 0)['resolution'] % 3 == 0
    straight = as_json('train', corpus, '-o', tmp_path/'m', '--auto-res', '--log-every', 0)['resolution']
    assert straight % 4 == 0 and as_json('info', tmp_path/'m')['config']['resolution'] == straight


# Labels

def test_labels_from_files_and_tables(corpus, tmp_path):
    "The same labels give the same counts, wherever they come from"
    train(corpus, '-o', tmp_path/'yaml', '--aux-key', 'style')
    rows = [(os.path.relpath(path, tmp_path), path.with_suffix('.meta.yaml').read_text().split()[1]) for path in sorted(corpus.glob('*.mid'))]
    for column, mark in (('midi_filename', ''), ('path', '\ufeff'), ('filename', '')):
        with open(tmp_path/'labels.csv', 'w', newline='', encoding='utf-8') as file:
            file.write(mark)
            csv.writer(file).writerows([(column, 'bpm', 'style'), *((name, 1, style) for name, style in rows)])
        train(corpus, '-o', tmp_path/'csv', '--aux-key', 'style', '--aux-csv', tmp_path/'labels.csv')
        one, other = GrooveModel.load(tmp_path/'csv').tables, GrooveModel.load(tmp_path/'yaml').tables
        assert one.keys() == other.keys() and all(np.array_equal(one[name][i], other[name][i]) for name in one for i in (0, 1))
    assert as_json('info', tmp_path/'yaml')['styles'] == ['funk', 'jazz', 'rock']
    train(corpus, '-o', tmp_path/'tempo', '--aux-key', 'bpm')
    assert all(style.isdecimal() for style in GrooveModel.load(tmp_path/'tempo').styles)
    for content, code in (('', 2), ('a,b\n1,2\n', 2), ('midi_filename,mood\nx,y\n', 2)):
        (tmp_path/'labels.csv').write_text(content)
        train(corpus, '-o', tmp_path/'m', '--aux-key', 'style', '--aux-csv', tmp_path/'labels.csv', code=code)
    assert str(tmp_path/'none.csv') in train(corpus, '-o', tmp_path/'m', '--aux-key', 'style', '--aux-csv', tmp_path/'none.csv', code=2)


@pytest.mark.parametrize('content', [b'style,midi_filename\nrock\n', b'midi_filename,style\n\xff,x\n', b'midi_filename,style\n' + b'a' * 200_000 + b',x\n'], ids=['short row', 'not utf-8', 'long field'])
def test_damaged_tables(corpus, tmp_path, content):
    (tmp_path/'labels.csv').write_bytes(content)
    assert 'labels.csv, line ' in train(corpus, '-o', tmp_path/'m', '--aux-key', 'style', '--aux-csv', tmp_path/'labels.csv', code=1)


def test_damaged_labels_are_reported(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path/'c')
    for path, wrong in zip(sorted((tmp_path/'c').glob('*.yaml')), (b'style: [', b'- 1\n', b'style: {a: 1}', b'style: "\xff"', b'style: !!python/object/apply:os.getcwd []', b'style: "\\ud800"', b'', b'style:\n')): path.write_bytes(wrong)
    (tmp_path/'c/loop-0008.meta.yaml').unlink()
    (tmp_path/'c/loop-0009.meta.yaml').unlink()
    (tmp_path/'c/loop-0009.meta.yaml').mkdir()
    train(tmp_path/'c', '-o', tmp_path/'m', '--aux-key', 'style')
    assert [(line['index'], line['reason']) for line in skipped(tmp_path/'m')] == [(i, 'bad_metadata') for i in (0, 1, 2, 3, 4, 5, 9)]
    train(tmp_path/'c', '-o', tmp_path/'m')
    assert skipped(tmp_path/'m') == []  # nobody asked for labels


def test_real_table(shared_data, tmp_path):
    "The Groove MIDI Dataset's own info.csv"
    folder = shared_data/'groove_midi'
    with open(folder/'info.csv', newline='') as file: rows = [row for row in csv.DictReader(file) if row['drummer'] == 'drummer5'][:40]
    (tmp_path/'list').write_text('\n'.join(str(folder/row['midi_filename']) for row in rows))
    train('--from-filelist', tmp_path/'list', '-o', tmp_path/'m', '--aux-key', 'style', '--aux-csv', folder/'info.csv')
    kept = {row['midi_filename'] for row in rows} - {os.path.relpath(line['path'], folder) for line in skipped(tmp_path/'m')}
    assert as_json('info', tmp_path/'m')['styles'] == sorted({row['style'] for row in rows if row['midi_filename'] in kept})


# Sampling

def test_same_seed_same_bytes(model, tmp_path, python):
    def files(folder, *flags):
        (tmp_path/folder).mkdir(exist_ok=True)
        command('sample', model, '-n', 3, '-l', 2, '--out-midi', tmp_path/folder/'groove.mid', *flags)
        return [path.read_bytes() for path in sorted((tmp_path/folder).glob('groove-*.mid'))]
    first = files('a', '--seed', 7)
    assert len(first) == len(set(first)) == 3 and files('b', '--seed', 7) == first and files('c', '--seed', 8) != first
    done = python('-m', 'datatools.groove', 'sample', model, '-n', 3, '-l', 2, '--seed', 7, '--out-midi', tmp_path/'d.mid')
    assert done.stdout.split() == [str(tmp_path/f'd-{i}.mid') for i in range(3)] and [(tmp_path/f'd-{i}.mid').read_bytes() for i in range(3)] == first
    command('sample', model, '-l', 2, '--seed', 7, '--out-midi', tmp_path/'one.mid')
    assert (tmp_path/'one.mid').read_bytes() == first[0]


def test_midi_that_others_read(model, tmp_path):
    hits = json.loads(command('sample', model, '-l', 4, '--seed', 3, '--print-json', '--out-midi', tmp_path/'x.mid', stdout_only=True))
    file, score = mido.MidiFile(tmp_path/'x.mid'), symusic.Score(tmp_path/'x.mid')
    assert file.type == 1 and file.ticks_per_beat == score.tpq == hits['ticks_per_beat']
    expected = sorted((hit['tick'], hit['pitch'], hit['velocity']) for hit in hits['hits'])
    assert sorted((note.time, note.pitch, note.velocity) for track in score.tracks if track.is_drum for note in track.notes) == expected
    found = [(now, message.note, message.velocity) for track in file.tracks for now, message in zip(itertools.accumulate(message.time for message in track), track) if message.type == 'note_on' and message.velocity]
    assert sorted(found) == expected and all(message.channel == 9 for track in file.tracks for message in track if message.type == 'note_on')
    assert max(tick for tick, *_ in expected) < 4 * 4 * 480 and abs(score.tempos[0].qpm - hits['tempo']) < 0.01


def sampled(model, *flags):
    "200 grooves of two bars: (onsets, mean velocity, distinct grooves, share of hits on pitch 51)"
    lines = [json.loads(line) for line in command('sample', model, '-n', 200, '-l', 2, '--print-json', *flags, stdout_only=True).splitlines()]
    assert [line['index'] for line in lines] == list(range(200))
    hits = [hit for line in lines for hit in line['hits']]
    grid = {tuple(sorted((round(hit['tick'] / 120), hit['pitch']) for hit in line['hits'])) for line in lines}
    return len(hits), np.mean([hit['velocity'] for hit in hits]), len(grid), np.mean([hit['pitch'] == 51 for hit in hits])


def test_sampling_flags(model):
    number, loudness, distinct, ride = sampled(model)
    assert sampled(model, '--top-k', 1)[2] == 1 and sampled(model, '--temperature', 0.3)[2] < distinct <= sampled(model, '--temperature', 2)[2]
    assert sampled(model, '--temperature', 0.3)[2] < sampled(model, '--temperature', 0.3, '--temperature-end', 3)[2] and sampled(model, '--top-p', 0.5)[2] < distinct
    assert sampled(model, '--novelty', 0)[2] < sampled(model, '--novelty', 1)[2]
    assert sampled(model, '--cond-style', 'rock')[3] < ride < sampled(model, '--cond-style', 'jazz')[3]
    quiet, loud = (sampled(model, '--cond-velocity', velocity)[1] for velocity in (40, 100))
    assert abs(quiet - 40) < 8 and abs(loud - 100) < 12 and quiet < loudness < loud


def test_drawing(model):
    text = command('sample', model, '-l', 3, '-n', 2)
    rows = [line for line in text.splitlines() if line.strip()]
    assert all(len(row.split('|')) == 5 and {len(bar) for bar in row.split('|')[1:4]} == {16} for row in rows) and any('kick' in row for row in rows) and text.count('\n\n') == 2


def test_conditions_that_were_not_trained(corpus, tmp_path):
    train(corpus, '-o', tmp_path/'m')
    assert '--aux-key' in command('sample', tmp_path/'m', '--cond-style', 'rock', code=2)


# Reports

def test_eval(model, corpus):
    figures = as_json('eval', model, corpus)
    assert figures['files'] == 12 and figures['impossible_share'] == 0 and figures['skipped'] == {}
    assert figures['bits_per_bar'] == pytest.approx(figures['bits_per_onset'] * figures['onsets'] / figures['bars']) and figures['perplexity'] == pytest.approx(2 ** figures['bits_per_onset'])
    assert {'bits_per_onset', 'bits_per_bar', 'impossible_share'} <= {*figures} and f'{figures["bits_per_onset"]:,.4g}' in command('eval', model, corpus)
    names = '\n'.join(map(str, sorted(corpus.glob('*.mid'))))
    assert as_json('eval', model, '--from-filelist', '-', input=names) == figures


def test_info_and_stats(model, corpus):
    info, stats = as_json('info', model), as_json('stats', model)
    assert info['config']['order'] == 8 and info['totals']['kept'] == 12 and info['styles'] == ['funk', 'jazz', 'rock'] and info['complete'] is True
    assert stats['onsets'] == int(GrooveModel.load(model).table('ngram')[1].sum()) and list(stats['orders']) == list('12345678') and sum(stats['drums'].values()) == pytest.approx(1, abs=1e-3)
    assert [row['distinct'] for row in stats['orders'].values()] == sorted(row['distinct'] for row in stats['orders'].values()) and 0 < stats['simultaneous_share'] < 1
    assert 'funk, jazz, rock' in command('info', model) and 'seen once' in command('stats', model)


def test_export(model, tmp_path):
    assert 'order 8' in command('export', model, '--arpa', tmp_path/'x.arpa')
    lines = (tmp_path/'x.arpa').read_text().splitlines()
    assert lines[0] == '\\data\\' and lines[-1] == '\\end\\' and '\\8-grams:' in lines
    announced = {int(n): int(count) for n, count in re.findall(r'ngram (\d)=(\d+)', '\n'.join(lines))}
    for order, count in announced.items():
        start = lines.index(f'\\{order}-grams:') + 1
        assert len(list(itertools.takewhile(bool, lines[start:]))) == count


def test_output_that_cannot_be_written(model, tmp_path):
    for arguments in (['export', model, '--arpa', tmp_path/'new/folder/x'], ['sample', model, '--out-midi', tmp_path/'new/folder/y']): command(*arguments)
    assert {path.name for path in (tmp_path/'new/folder').iterdir()} == {'x', 'y'}
    (tmp_path/'file').write_text('no folder')
    for arguments in (['export', model, '--arpa', tmp_path/'file/x'], ['sample', model, '--out-midi', tmp_path/'file/x']):
        said = command(*arguments, code=1)
        assert str(tmp_path/'file') in said and '.tmp' not in said
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, '-m', 'datatools.groove', 'info', model], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith('Error: ') and done.stderr.count('\n') == 1


def test_every_reason_has_a_number_of_its_own(): assert len({int(each) for each in Skip}) == len(Skip)
