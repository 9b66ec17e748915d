"Precomputing: the same bytes whatever happens on the way, a reason for every file that is refused, and nothing lost, doubled or left behind"
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from tqdm.auto import tqdm

from datatools.core import DatatoolsError, FormatError, LockedError, MismatchError, UsageError, file_lock, hash_file
from datatools.stft import precompute as module
from datatools.stft.audio import read_audio
from datatools.stft.precompute import (PrecomputeOptions, find_audio, is_validation, precompute, read_metadata, split_names, transform_file,
                                       verify_store)
from datatools.stft.store import environment, open_store
from datatools.stft.transform import STFTConfig, open_audio, stft_fields

RATE = 8_000
CONFIG = STFTConfig(RATE, (256,), 64, segment_seconds=.5)
INLINE, ONE, TWO = (PrecomputeOptions(workers=workers) for workers in range(3))
SIDES = ('train.lmdb', 'val.lmdb')


def tone(path, seconds, rate=RATE, channels=1, seed=0):
    "A file of noise"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, .1, (round(seconds * rate), channels)), rate)
    return path


def flat(path):
    "FLAC whose middle is damaged: its beginning decodes"
    tone(path, 60, 44_100)
    content = bytearray(path.read_bytes())
    content[len(content) // 2:len(content) // 2 + 5000] = bytes(5000)
    path.write_bytes(content)


def ruins(folder):
    "Files that cannot be used, and what is said of them"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'empty.wav').touch()
    (folder/'no audio.mp3').write_bytes(bytes(range(256)) * 9)
    tone(folder/'cut off.wav', 1)
    os.truncate(folder/'cut off.wav', 9000)
    flat(folder/'damaged.flac')
    tone(folder/'short.wav', .01)
    soundfile.write(folder/'nan.wav', np.where(np.arange(RATE) == 5000, np.nan, 0.), RATE, subtype='FLOAT')
    (folder/'nowhere.wav').symlink_to('/nowhere/at all.wav')
    os.mkfifo(folder/'pipe.wav')
    return {'empty.wav': 'is empty', 'no audio.mp3': 'is no audio file', 'cut off.wav': 'is cut off', 'damaged.flac': 'damaged', 'short.wav': 'is too short',
            'nan.wav': 'sample 5000 of channel 0 is nan', 'nowhere.wav': 'cannot be opened: No such file', 'pipe.wav': 'is no regular file'}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "24 files, 4 folders, among them some that cannot be used"
    folder = tmp_path_factory.mktemp('corpus')
    for number in range(16): tone(folder/f'{number % 3}/{number:02}.wav', [.1, 1.2, 3.9][number % 3], seed=number)
    ruins(folder/'ruins')
    return folder


def run(corpus, output, options=INLINE, commit_bytes=200_000, config=CONFIG, **arguments):
    "Precompute with transactions that are small, so that there are many of them"
    whole, module.StoreWriter = module.StoreWriter, partial(module.StoreWriter, commit_bytes=commit_bytes)
    try: return precompute([corpus], output, config, **{'val_fraction': .3, 'options': options, **arguments})
    finally: module.StoreWriter = whole


def hashes(output): return [hash_file(output/side/'data.mdb') for side in SIDES]


def tidy(output):
    "Nothing is left of the work"
    assert sorted(os.listdir(output)) == ['.lock', 'files.json', *SIDES]
    for side in SIDES: assert sorted(os.listdir(output/side)) == ['data.mdb', 'writer.lock']


@pytest.fixture(scope='module')
def reference(corpus, tmp_path_factory):
    "The stores of an uninterrupted run in this process"
    output = tmp_path_factory.mktemp('reference')/'stores'
    run(corpus, output)
    return output


def reasons(summary): return summary['train']['reasons'] | summary['val']['reasons']


# what is in the stores


def test_items_are_the_transforms_of_the_audio_in_order(corpus, reference):
    tidy(reference)
    files = find_audio(corpus)
    for side in SIDES:
        assert verify_store(reference/side) == []
        with environment(reference/side) as store:
            sources, index = store.sources(), 0
            assert [*sources] == [name for name in files if is_validation(name, .3) == (side == 'val.lmdb')]
            for name, fact in sources.items():
                if 'refused' in fact: continue
                audio, _ = read_audio(files[name])
                assert fact['first'] == index and fact['bytes'] == files[name].stat().st_size and fact['seconds'] == audio.shape[1] / RATE
                for start in range(0, audio.shape[1], RATE // 2):
                    segment = np.zeros((1, RATE // 2), np.float32)
                    segment[:, :audio[:, start:start + RATE // 2].shape[1]] = audio[:, start:start + RATE // 2]
                    if audio.shape[1] - start < 256: continue
                    record, wanted = store.record(index), stft_fields(segment, CONFIG)
                    assert record.metadata == dict(source=name, start_seconds=start / RATE, samples=min(RATE // 2, audio.shape[1] - start), sample_rate=RATE)
                    assert [*record.fields] == [*wanted] and all((record.fields[key] == wanted[key]).all() for key in wanted)
                    index += 1
                assert fact['items'] == index - fact['first']
            assert index == store.info().count > 10


def test_stereo_resampled_whole_files_with_audio_and_several_windows(tmp_path):
    for number, rate in enumerate((44_100, 22_050, 8_000)): tone(tmp_path/f'in/{number}.flac', 1 + number, rate, 2, number)
    tone(tmp_path/'in/mono.wav', 1, RATE)
    tone(tmp_path/'in/three.wav', 1, RATE, 3)
    config = STFTConfig(RATE, (128, 512, 256), 64, 2, None, 'complex64')
    summary = precompute(tmp_path/'in', tmp_path/'out', config, 0., keep_audio=True, options=INLINE)
    assert [*reasons(summary)] == ['three.wav'] and 'has 3 channels' in reasons(summary)['three.wav']
    with environment(tmp_path/'out/train.lmdb') as store:
        assert not store.info().constant_schema
        for index, name in enumerate(('0.flac', '1.flac', '2.flac', 'mono.wav')):
            audio, record = read_audio(tmp_path/'in'/name, RATE, 2)[0], store.record(index, verify=True)
            assert [*record.fields] == ['stft_128', 'stft_128_scale', 'stft_512', 'stft_512_scale', 'stft_256', 'stft_256_scale', 'audio']
            assert (record.fields['audio'] == audio).all() and record.metadata['source'] == name
            assert all((record.fields[key] == value).all() for key, value in stft_fields(audio, config).items())


def test_names_of_all_kinds(tmp_path):
    names = ['plain.wav', 'ünï/☕.wav', 'ends with space .wav', '"quoted".wav', 'x' * 200 + '.wav', f'{"deep/" * 150}nested.wav', os.fsdecode(b'latin\xe9.wav')]
    for name in names:
        (tmp_path/'in'/name).parent.mkdir(parents=True, exist_ok=True)
        tone(tmp_path/'new.wav', .2).rename(tmp_path/'in'/name)
    summary = precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=INLINE)
    assert summary['train']['items'] == len(names) and not reasons(summary)
    with environment(tmp_path/'out/train.lmdb') as store:
        assert {*store.sources()} == {*names} == {store.record(index).metadata['source'] for index in range(len(names))}
    assert precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)['items_now'] == 0


# the same bytes


@pytest.mark.parametrize('options', [ONE, TWO], ids=['one worker', 'two workers'])
def test_workers_do_not_matter(corpus, reference, tmp_path, options):
    summary = run(corpus, tmp_path/'out', options)
    assert hashes(tmp_path/'out') == hashes(reference)
    assert len(reasons(summary)) == 8
    tidy(tmp_path/'out')


def test_what_is_held_in_memory_does_not_matter(corpus, reference, tmp_path, monkeypatch):
    for memory in (0, 20_000):
        monkeypatch.setattr(module, 'MEMORY_BYTES', memory)
        run(corpus, tmp_path/f'{memory}')
        assert hashes(tmp_path/f'{memory}') == hashes(reference)


def test_a_map_that_must_grow(corpus, reference, tmp_path):
    run(corpus, tmp_path/'out', PrecomputeOptions(workers=0, map_size=1 << 16))
    for side in SIDES:
        assert open_store(tmp_path/'out'/side).count == open_store(reference/side).count
        assert verify_store(tmp_path/'out'/side) == []


def in_child(function, *arguments, **options):
    "Run a function in a forked process; its number"
    process = os.fork()
    if not process:
        code = 1
        tqdm.set_lock(threading.RLock())  # its own one is shared among forks: who is killed with it stops all others
        try:
            function(*arguments, **options)
            code = 0
        except BaseException as error: print(repr(error), file=sys.stderr, flush=True)
        finally: os._exit(code)
    return process


def joined(process): return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def counted(output): return [open_store(output/side).count if (output/side/'data.mdb').exists() else 0 for side in SIDES]


def killed_until_complete(corpus, output, chance, longest):
    "Runs that are killed at random moments, until one is not; the number of kills"
    kills, before = 0, [0, 0]
    while True:
        child = in_child(run, corpus, output, resume=True)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        status = joined(child)
        if status == 0: return kills
        assert status == -signal.SIGKILL
        kills, now = kills + 1, counted(output)
        assert all(old <= new for old, new in zip(before, now))
        before, longest = now, longest * 1.05


def drill(corpus, reference, folder, seed, seconds):
    "Stores made under kills, for some time: how many, and the kills"
    chance, end, stores, kills = random.Random(seed), time.monotonic() + seconds, 0, 0
    begun = time.monotonic()
    run(corpus, folder/'once')
    duration = time.monotonic() - begun
    while time.monotonic() < end:
        kills += killed_until_complete(corpus, folder/'out', chance, duration / chance.choice([1, 2, 4]))
        assert hashes(folder/'out') == hashes(reference)
        tidy(folder/'out')
        shutil.rmtree(folder/'out')
        stores += 1
    return stores, kills


def test_killed_anywhere_the_stores_come_out_the_same(corpus, reference, tmp_path):
    stores, kills = drill(corpus, reference, tmp_path, 0, 5)
    assert stores >= 1 and kills >= 3


@pytest.mark.drill
def test_killed_for_ten_minutes_the_stores_come_out_the_same(corpus, reference, tmp_path):
    stores, kills = drill(corpus, reference, tmp_path, time.time_ns(), 600)
    print(f'{stores} stores, {kills} kills')


DRIVER = '''
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_stft_precompute import run, PrecomputeOptions
if __name__ == '__main__':
    print('begun', flush=True)
    run({corpus!r}, {output!r}, PrecomputeOptions(workers=2), resume=True)
'''


@pytest.fixture
def driver(root, corpus, tmp_path):
    "Start a run with two workers in a process of its own"
    (tmp_path/'driver.py').write_text(DRIVER.format(tests=str(root/'tests'), root=str(root), corpus=str(corpus), output=str(tmp_path/'out')))
    def start():
        process = subprocess.Popen([sys.executable, tmp_path/'driver.py'], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'begun\n'
        return process
    return start


def workers_of(process, number=2, seconds=30):
    "The workers of a run, when there are so many"
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        found = [child for child in psutil.Process(process.pid).children() if 'spawn_main' in ' '.join(child.cmdline())]
        if len(found) >= number: return found
        time.sleep(.01)
    return []


def kill_runs(driver, corpus, reference, output, delays):
    "Kill runs with workers, then let one end"
    for delay in delays:
        process = driver()
        workers = workers_of(process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        assert psutil.wait_procs(workers, timeout=30)[1] == []  # none outlives it
    run(corpus, output, resume=True)
    assert hashes(output) == hashes(reference)
    tidy(output)


def test_a_run_with_workers_is_killed(driver, corpus, reference, tmp_path): kill_runs(driver, corpus, reference, tmp_path/'out', [1.5])


@pytest.mark.drill
def test_many_runs_with_workers_are_killed(driver, corpus, reference, tmp_path):
    chance = random.Random(time.time_ns())
    for _ in range(10):
        kill_runs(driver, corpus, reference, tmp_path/'out', [chance.uniform(0, 6) for _ in range(5)])
        shutil.rmtree(tmp_path/'out')


def test_a_worker_is_killed(driver, reference, tmp_path):
    process = driver()
    for worker in workers_of(process): worker.kill()
    assert process.wait(60) == 0
    process.communicate()
    assert hashes(tmp_path/'out') == hashes(reference)
    tidy(tmp_path/'out')


# files that are refused


def test_reasons_are_the_same_each_time_and_everywhere(tmp_path):
    wanted = ruins(tmp_path/'a/deep/in')
    tone(tmp_path/'a/deep/in/good.wav', .5)
    first = reasons(precompute([tmp_path/'a/deep/in'], tmp_path/'1', CONFIG, .5, options=INLINE))
    assert {*first} == {*wanted}
    for name, reason in wanted.items(): assert reason in first[name] and str(tmp_path) not in first[name], first[name]
    shutil.move(tmp_path/'a/deep/in', tmp_path/'elsewhere')
    assert reasons(precompute([tmp_path/'elsewhere'], tmp_path/'2', CONFIG, .5, options=ONE)) == first
    assert hashes(tmp_path/'1') == hashes(tmp_path/'2')
    assert reasons(precompute([tmp_path/'elsewhere'], tmp_path/'2', CONFIG, .5, resume=True)) == first


def test_a_file_that_is_damaged_in_the_middle_leaves_no_items(tmp_path):
    flat(tmp_path/'a.flac')
    made = transform_file(str(tmp_path/'a.flac'), str(tmp_path/'spool'), 'a.flac', {}, config=CONFIG)
    assert [*made] == ['refused'] and (tmp_path/'spool').stat().st_size > 100_000
    assert precompute(tmp_path/'a.flac', tmp_path/'out', CONFIG, 0., options=INLINE)['train']['items'] == 0


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can become someone else')
def test_a_file_that_may_not_be_read():
    folder = Path(tempfile.mkdtemp())
    try:
        for name in ('in/mine.wav', 'in/yours.wav'): tone(folder/name, .5)
        (folder/'in/yours.wav').chmod(0)
        for place in (folder, folder/'in'): place.chmod(0o777)
        def as_nobody():
            os.seteuid(65534)
            summary = precompute(folder/'in', folder/'out', CONFIG, 0., options=INLINE)
            assert reasons(summary) == {'yours.wav': 'cannot be opened: Permission denied'} and summary['train']['items'] == 1
            (folder/'in/shut').mkdir(mode=0)
            with pytest.raises(PermissionError, match='shut'): find_audio(folder/'in')
        assert joined(in_child(as_nobody)) == 0
    finally: shutil.rmtree(folder)


@pytest.mark.parametrize('options', [INLINE, ONE], ids=['no worker', 'one worker'])
def test_storage_that_is_away_for_a_while(tmp_path, monkeypatch, options):
    "What a listing showed and is not there now is no fault of the files: the job stops, and goes on later"
    for number in range(6): tone(tmp_path/f'in/{number}.wav', .6, seed=number)
    precompute([tmp_path/'in'], tmp_path/'once', CONFIG, 0., options=INLINE)
    take = module._take
    def away(part, result, *rest):
        take(part, result, *rest)
        if result.key == '1.wav': (tmp_path/'in').rename(tmp_path/'away')
    monkeypatch.setattr(module, '_take', away)
    monkeypatch.setattr(module._Batches, 'room', lambda *_: 1)  # what comes next has not begun
    with pytest.raises(DatatoolsError, match='2.wav: FileNotFoundError.*resume'): precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=options)
    monkeypatch.undo()
    (tmp_path/'away').rename(tmp_path/'in')
    summary = precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)
    assert summary['train']['items'] == 12 and not reasons(summary)
    assert hashes(tmp_path/'out') == hashes(tmp_path/'once')
    tidy(tmp_path/'out')


def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
    "Decoders take an error of input and output for damage; the bytes are read before that is believed"
    for name in 'abc': tone(tmp_path/f'in/{name}.wav', .6)
    opened = open
    class Away:
        "A file that answers as a disk with a bad sector does"
        def __init__(self, *_): pass
        def __enter__(self): return self
        def __exit__(self, *_): pass
        def read(self, *_): raise OSError(5, 'Input/output error')
    def some(path, mode='r', *rest, **more): return Away() if str(path).endswith('b.wav') and mode == 'rb' else opened(path, mode, *rest, **more)
    monkeypatch.setattr(module, 'open', some, raising=False)
    def damaged(path, *_): raise FormatError(f'{path}: is damaged near 0.00 s')
    monkeypatch.setattr(module, 'open_audio', lambda path, config: damaged(path) if path.endswith('b.wav') else open_audio(path, config))
    with pytest.raises(DatatoolsError, match='b.wav: OSError: .*Input/output error'): precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=INLINE)
    monkeypatch.setattr(module, 'open', opened, raising=False)
    assert reasons(precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)) == {'b.wav': 'is damaged near 0.00 s'}


def deadly(path, *arguments, **options):
    "What a worker does in the tests of decoders that die"
    if 'segv' in path: os.kill(os.getpid(), signal.SIGSEGV)
    if 'kill' in path: os.kill(os.getpid(), signal.SIGKILL)
    if 'hang' in path: time.sleep(1000)
    if 'odd' in path: raise RuntimeError('out of luck')
    return transform_file(path, *arguments, **options)


def test_a_decoder_that_dies_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'transform_file', deadly)
    monkeypatch.setattr(module, 'RETRIES', 1)
    for name in ('a.wav', 'segv.wav', 'z.wav'): tone(tmp_path/'in'/name, .5)
    summary = precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=ONE)
    assert reasons(summary) == {'segv.wav': 'the process that read it failed: the worker was killed by SIGSEGV'} and summary['train']['items'] == 2
    tidy(tmp_path/'out')


def test_a_decoder_that_dies_costs_only_its_file(tmp_path, monkeypatch):
    "Files that share a task with one that kills its process, or hangs"
    for number in range(40): tone(tmp_path/f'in/{number:02}{ {3: " segv", 5: " hang"}.get(number, "") }.wav', .2, seed=number)
    tone(tmp_path/'in/04 short.wav', .01)
    once = precompute([tmp_path/'in'], tmp_path/'once', CONFIG, 0., options=INLINE, skip=['03 segv.wav', '05 hang.wav'])
    monkeypatch.setattr(module, 'transform_file', deadly)
    monkeypatch.setattr(module, 'RETRIES', 0)
    monkeypatch.setattr(module, 'TASK_SECONDS', 60)
    sent, whole = [], module.run_tasks
    def counted(function, tasks, **options): return whole(function, (sent.append(len(task.arguments[0])) or task for task in tasks), **options)
    monkeypatch.setattr(module, 'run_tasks', counted)
    summary = precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=PrecomputeOptions(timeout=8.))
    assert sent[0] == 10 and summary['train']['items'] == once['train']['items'] == 38
    said = {name: reason for name, reason in reasons(summary).items() if name != '04 short.wav'}
    assert said == {'03 segv.wav': 'the process that read it failed: the worker was killed by SIGSEGV', '05 hang.wav': 'the process that read it failed: stopped after 8.0 seconds'}
    assert reasons(summary)['04 short.wav'] == reasons(once)['04 short.wav']
    with environment(tmp_path/'out/train.lmdb') as store, environment(tmp_path/'once/train.lmdb') as other:
        for index in range(38): assert store.record(index).fields['stft_256'].tobytes() == other.record(index).fields['stft_256'].tobytes()


def test_a_decoder_that_hangs_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'transform_file', deadly)
    monkeypatch.setattr(module, 'RETRIES', 0)
    tone(tmp_path/'hang.wav', .5)
    summary = precompute(tmp_path/'hang.wav', tmp_path/'out', CONFIG, 0., options=PrecomputeOptions(timeout=1.))
    assert reasons(summary) == {'hang.wav': 'the process that read it failed: stopped after 1.0 seconds'}


@pytest.mark.parametrize('kind, said', [('odd', 'RuntimeError: out of luck'), ('kill', 'killed by SIGKILL')])
def test_what_is_not_the_fault_of_a_file_stops_the_job(tmp_path, monkeypatch, kind, said):
    for name in ('a.wav', f'b {kind}.wav', 'c.wav'): tone(tmp_path/'in'/name, .5)
    monkeypatch.setattr(module, 'transform_file', deadly)
    monkeypatch.setattr(module, 'RETRIES', 0)
    children = {*psutil.Process().children()}
    with pytest.raises(DatatoolsError, match=said): precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=TWO)
    assert not [child for child in {*psutil.Process().children()} - children if 'spawn_main' in ' '.join(child.cmdline())]
    assert not [*(tmp_path/'out').glob('.spool*')]
    monkeypatch.undo()
    assert precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)['train']['items'] == 3
    tidy(tmp_path/'out')


# interruptions of other kinds


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith('linux'), reason='only root can mount a small disk')
@pytest.mark.parametrize('options', [INLINE, ONE], ids=['no worker', 'one worker'])
def test_a_full_disk(corpus, reference, tmp_path, monkeypatch, options):
    monkeypatch.setattr(module, 'TASK_SECONDS', 0)  # or the spool takes all of so small a disk
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1500k', 'tmpfs', disk]).returncode: pytest.skip('mounting is not allowed here')
    try:
        with pytest.raises((DatatoolsError, OSError), match='No space left on device'): run(corpus, disk/'out', options)
        assert counted(disk/'out')[0] > 0 and not [*(disk/'out').glob('.spool*')]
        with pytest.raises((DatatoolsError, OSError), match='No space left on device'): run(corpus, disk/'out', resume=True)
        subprocess.run(['mount', '-o', 'remount,size=64m', disk], check=True)
        run(corpus, disk/'out', resume=True)
        assert hashes(disk/'out') == hashes(reference)
        tidy(disk/'out')
    finally: subprocess.run(['umount', disk], check=True)


def test_a_file_that_is_half_in_the_store_must_stay_as_it_was(tmp_path, monkeypatch):
    tone(tmp_path/'in/a.wav', 20)
    tone(tmp_path/'in/b.wav', 20, seed=1)
    def dies(part, *arguments):
        append = part.writer.append
        def some(record):
            append(record)
            if part.writer.count == 15: raise KeyboardInterrupt
        part.writer.append = some
        return take(part, *arguments)
    take, alone = module._Part.take, partial(run, tmp_path/'in', tmp_path/'out', val_fraction=0.)
    monkeypatch.setattr(module._Part, 'take', dies)
    with pytest.raises(KeyboardInterrupt): alone()
    monkeypatch.undo()
    assert 0 < counted(tmp_path/'out')[0] < 40
    sound = (tmp_path/'in/a.wav').read_bytes()
    (tmp_path/'in/a.wav').write_bytes(bytes(len(sound)))
    with pytest.raises(DatatoolsError, match='a.wav: [0-9]+ of its items are in .* is no audio file'): alone(resume=True)
    with soundfile.SoundFile(tmp_path/'in/a.wav', 'w', RATE, 1) as file: file.write(np.zeros(RATE))
    with open(tmp_path/'in/a.wav', 'ab') as file: file.write(bytes(len(sound) - file.tell()))
    with pytest.raises(DatatoolsError, match='fewer of them'): alone(resume=True)
    tone(tmp_path/'in/a.wav', 20, seed=7)
    assert (tmp_path/'in/a.wav').stat().st_size == len(sound)
    with pytest.raises(DatatoolsError, match='a.wav: [0-9]+ of its items are in .* has other audio'): alone(resume=True)
    (tmp_path/'in/a.wav').write_bytes(sound)
    assert alone(resume=True)['train']['items'] == 80
    run(tmp_path/'in', tmp_path/'again', val_fraction=0.)
    assert hashes(tmp_path/'out') == hashes(tmp_path/'again')


def halfway(folder, monkeypatch, after, **options):
    "A job that is stopped when that file is in its store"
    take = module._take
    def stops(part, result, *rest):
        take(part, result, *rest)
        if result.key == after: raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module, '_take', stops)
        patch.setattr(module._Part, 'note', lambda part, name, fact, note=module._Part.note: (note(part, name, fact), part.writer.commit()))
        with pytest.raises(KeyboardInterrupt): precompute([folder/'in'], folder/'out', CONFIG, 0., options=INLINE, **options)


def test_a_file_in_the_store_must_stay_as_it_was(tmp_path, monkeypatch):
    for number in range(4): tone(tmp_path/f'in/{number}.wav', 1, seed=number)
    again = partial(precompute, [tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)
    precompute([tmp_path/'in'], tmp_path/'once', CONFIG, 0., options=INLINE)
    halfway(tmp_path, monkeypatch, '1.wav')
    before = hashes(tmp_path/'out')
    tone(tmp_path/'in/1.wav', 1, seed=11)  # other audio of the same size
    with pytest.raises(MismatchError, match='1.wav: its items are in .*train.lmdb, and now it holds something else'): again()
    assert hashes(tmp_path/'out') == before
    tone(tmp_path/'in/1.wav', 1, seed=1)  # as it was, at another time
    os.utime(tmp_path/'in/0.wav')
    read = []
    monkeypatch.setattr(module, 'file_checksum', lambda path, whole=module.file_checksum: (read.append(Path(path).name), whole(path))[1])
    assert again()['train']['items'] == 8
    assert read == ['0.wav', '1.wav', '2.wav', '3.wav']
    with environment(tmp_path/'out/train.lmdb') as store, environment(tmp_path/'once/train.lmdb') as once: assert store.sources() == once.sources()
    again()
    assert len(read) == 4  # times are the same now: nothing is read
    with environment(tmp_path/'out/train.lmdb') as store: assert store.sources()['1.wav']['crc32c'] == module.file_checksum(tmp_path/'in/1.wav')


def test_files_that_go_while_a_job_rests(tmp_path, monkeypatch):
    "What is in the store may go; what is not must be there, or be refused by name"
    for number in range(4): tone(tmp_path/f'in/{number}.wav', 1, seed=number)
    again = partial(precompute, [tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)
    halfway(tmp_path, monkeypatch, '1.wav')
    for name in ('0.wav', '2.wav'): (tmp_path/'in'/name).unlink()
    with pytest.raises(MismatchError, match='2.wav: no longer there, and not in'): again()
    with pytest.raises(UsageError, match="skip='5.wav'"): again(skip=['2.wav', '5.wav'])
    summary = again(skip=['2.wav'])
    assert summary['train']['items'] == 6 and summary['items_now'] == 2 and reasons(summary) == {'2.wav': 'was left out by name'}
    assert verify_store(tmp_path/'out/train.lmdb') == [] and again()['items_now'] == 0


def test_a_file_that_always_fails_can_be_left_out(tmp_path, monkeypatch):
    for name in ('a.wav', 'odd.wav', 'z.wav'): tone(tmp_path/'in'/name, .5)
    monkeypatch.setattr(module, 'transform_file', deadly)
    job = partial(precompute, [tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)
    for _ in range(2):
        with pytest.raises(DatatoolsError, match='odd.wav: RuntimeError: out of luck.*skip'): job()
    summary = job(skip='odd.wav')
    assert summary['train']['items'] == 2 and reasons(summary) == {'odd.wav': 'was left out by name'}


@pytest.mark.parametrize('finished', [True, False], ids=['complete', 'not complete'])
def test_refused_files_get_another_chance(tmp_path, monkeypatch, finished):
    for name in ('a.wav', 'segv.wav', 'z.wav'): tone(tmp_path/'in'/name, .5)
    (tmp_path/'in/empty.wav').touch()
    def first(path, *arguments, **options): return dict(refused='for a while') if 'segv' in path else transform_file(path, *arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(module, 'transform_file', first)
        if finished: precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=INLINE)
        else: halfway(tmp_path, monkeypatch, 'segv.wav')
    again = partial(precompute, [tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)
    summary = again(retry_refused=True)
    assert summary['train']['items'] == 3 and [*reasons(summary)] == ['empty.wav'] and summary['items_now'] == (1 if finished else 2)
    assert verify_store(tmp_path/'out/train.lmdb') == [] and again()['items_now'] == 0
    with environment(tmp_path/'out/train.lmdb') as store: assert store.record(store.sources()['segv.wav']['first']).metadata['source'] == 'segv.wav'
    tidy(tmp_path/'out')


def test_a_second_chance_that_is_interrupted(tmp_path, monkeypatch):
    "Half of a file that was refused once: the items of the store tell whose they are"
    for name in ('a.wav', 'b.wav', 'c.wav'): tone(tmp_path/'in'/name, 20, seed=ord(name[0]))
    with monkeypatch.context() as patch:
        patch.setattr(module, 'transform_file', lambda path, *arguments, **options: dict(refused='for a while') if path.endswith('b.wav') else transform_file(path, *arguments, **options))
        run(tmp_path/'in', tmp_path/'out', val_fraction=0.)
    append = module.StoreWriter.append
    def stops(writer, record):
        append(writer, record)
        if writer.count == 100: raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(module.StoreWriter, 'append', stops)
        with pytest.raises(KeyboardInterrupt): run(tmp_path/'in', tmp_path/'out', val_fraction=0., resume=True, retry_refused=True)
    assert 80 < counted(tmp_path/'out')[0] < 100
    summary = run(tmp_path/'in', tmp_path/'out', val_fraction=0., resume=True)
    assert summary['train']['items'] == 120 and not reasons(summary) and verify_store(tmp_path/'out/train.lmdb') == []


def test_an_item_that_no_store_can_hold(tmp_path):
    "LMDB holds 4 GiB as one value: that is said before there is no memory for it"
    path = tmp_path/'in/long.wav'
    path.parent.mkdir()
    with soundfile.SoundFile(path, 'w', 44_100, 1, 'PCM_U8') as file:
        for _ in range(40): file.write(np.zeros(44_100 * 400))
    summary = precompute([tmp_path/'in'], tmp_path/'out', STFTConfig(), 0., options=INLINE)
    assert 'is too long: an item of 5' in reasons(summary)['long.wav'] and 'segment_seconds' in reasons(summary)['long.wav']
    with pytest.raises(UsageError, match='segment_seconds=14400'): precompute([tmp_path/'in'], tmp_path/'again', STFTConfig(segment_seconds=14_400), options=INLINE)
    config = STFTConfig(RATE, (256, 512), 64, 2, dtype='float32')
    fields = stft_fields(np.zeros((2, 5001), np.float32), config)
    assert module.item_bytes(config, 5001, True) == sum(fields[f'stft_{window}'].nbytes for window in (256, 512)) + 2 * 5001 * 4


def test_two_runs_in_one_directory(corpus, reference, tmp_path):
    with file_lock(tmp_path/'.lock'):
        with pytest.raises(LockedError, match=f'process {os.getpid()}'): run(corpus, tmp_path)
    assert os.listdir(tmp_path) == ['.lock']
    ended = []
    def attempt():
        try: ended.append(precompute([corpus], tmp_path, CONFIG, .3, options=INLINE))
        except DatatoolsError as error: ended.append(error)
    threads = [threading.Thread(target=attempt) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert sum(isinstance(end, dict) for end in ended) == 1 and sum(isinstance(end, (LockedError, UsageError)) for end in ended) == 2, ended
    tidy(tmp_path)


def test_a_reader_in_the_way(tmp_path, monkeypatch):
    tone(tmp_path/'in/a.wav', 1)
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(module, '_results', stop)
    again = partial(precompute, [tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=INLINE)
    with pytest.raises(KeyboardInterrupt): again()
    monkeypatch.undo()
    with environment(tmp_path/'out/train.lmdb'), pytest.raises(DatatoolsError, match='close its readers'): again(resume=True)
    assert again(resume=True)['train']['items'] == 2
    tidy(tmp_path/'out')


def test_what_is_complete_is_left_alone(corpus, reference, tmp_path, monkeypatch):
    shutil.copytree(reference, tmp_path/'out')
    before = hashes(tmp_path/'out')
    def never(*_, **__): raise AssertionError('workers were started for nothing')
    monkeypatch.setattr(module, 'run_tasks', never)
    summary = run(corpus, tmp_path/'out', TWO, resume=True)
    assert summary['items_now'] == 0 and summary['train']['items'] == open_store(reference/'train.lmdb').count and len(reasons(summary)) == 8
    assert hashes(tmp_path/'out') == before
    with pytest.raises(UsageError, match='Resume the job that is there'): run(corpus, tmp_path/'out')
    assert hashes(tmp_path/'out') == before


def test_what_an_earlier_run_left_is_removed(corpus, reference, tmp_path):
    (tmp_path/'.spool-of a dead run').mkdir(parents=True)
    (tmp_path/'.spool-of a dead run/0').write_bytes(b'stale')
    run(corpus, tmp_path)
    tidy(tmp_path)
    assert hashes(tmp_path) == hashes(reference)


def test_relative_paths_hold_wherever_the_workers_are(tmp_path, monkeypatch):
    tone(tmp_path/'in/a.wav', .5)
    monkeypatch.chdir(tmp_path)  # multiprocessing puts workers into the folder where the program began
    assert precompute(['in'], 'out', CONFIG, 0., options=ONE)['train'] == dict(items=1, files=1, refused=0, audio_seconds=.5, reasons={})


# other inputs and settings


@pytest.mark.parametrize('change, said', [
    (lambda folder: tone(folder/'b.wav', .6), 'b.wav.bytes: 8044 before, 9644 now'), 
    (lambda folder: tone(folder/'new.wav', .5), 'new.wav: \\(none\\) before'), (lambda folder: (folder/'b.wav').rename(folder/'c.wav'), 'and 1 more|c.wav: \\(none\\)'),
    (lambda folder: dict(val_fraction=1.), 'a.wav.part: train before, val now'), (lambda folder: dict(config=STFTConfig(RATE, (256,), 32, segment_seconds=.5)), 'hop_length: 64 on disk, 32'),
    (lambda folder: dict(keep_audio=True), 'keep_audio: False on disk, True'), (lambda folder: dict(metadata=table(folder.parent/'t.csv', 'file,label\na.wav,x\n')), 'a.wav.metadata.label: \\(none\\) before, x now')],
    ids='size new renamed split hop audio metadata'.split())
def test_resuming_with_something_else_says_what(tmp_path, change, said):
    for name in ('a.wav', 'b.wav'): tone(tmp_path/'in'/name, .5)
    settings = dict(config=CONFIG, val_fraction=0., options=INLINE)
    precompute([tmp_path/'in'], tmp_path/'out', **settings)
    before, changed = hashes(tmp_path/'out'), change(tmp_path/'in')
    with pytest.raises(MismatchError, match=said): precompute([tmp_path/'in'], tmp_path/'out', **settings | (changed if isinstance(changed, dict) else {}), resume=True)
    assert hashes(tmp_path/'out') == before


def test_the_files_are_compared_even_without_their_list(tmp_path):
    tone(tmp_path/'in/a.wav', .5)
    precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., options=INLINE)
    (tmp_path/'out/files.json').unlink()
    tone(tmp_path/'in/a.wav', .6)
    with pytest.raises(MismatchError, match='files_sha256'): precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)


def table(path, text):
    path.write_text(text, encoding='utf-8')
    return path


def test_metadata_of_both_kinds(tmp_path):
    for name in ('a.wav', 'sub/b.wav'): tone(tmp_path/'in'/name, .5)
    csv = table(tmp_path/'t.csv', '\ufefffile,caption,label\na.wav,"two\nlines, one comma",3\n')
    assert read_metadata(csv) == {'a.wav': dict(caption='two\nlines, one comma', label='3')}
    lines = table(tmp_path/'t.jsonl', '{"file": "sub/b.wav", "caption": "odd\u2028line\u0085end", "tags": ["x", {"y": 1.5}]}\n\n')
    precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., metadata=lines, options=INLINE)
    with environment(tmp_path/'out/train.lmdb') as store:
        assert store.record(1).metadata == dict(source='sub/b.wav', start_seconds=0, samples=4000, sample_rate=RATE, caption='odd\u2028line\u0085end', tags=['x', dict(y=1.5)])
        assert store.record(0).metadata == dict(source='a.wav', start_seconds=0, samples=4000, sample_rate=RATE)


@pytest.mark.parametrize('name, text, said', [('t.csv', 'name,label\na.wav,x\n', 'entry 1 has no file'), ('t.csv', 'file,label\na.wav,x,y\n', 'more values than'), ('t.csv', 'file,label\na.wav,"x', 'is no table'),
    ('t.csv', 'file,source\na.wav,x\n', "'source' is a name that every item has"), ('t.csv', 'file,label\na.wav,x\na.wav,y\n', 'entry 2 is the second one'), ('t.csv', 'file\nnowhere.wav\n', 'nowhere.wav'),
    ('t.jsonl', '{"file": "a.wav"\n', 'line 1 is not JSON'), ('t.jsonl', '["a.wav"]\n', 'has no file'), ('t.jsonl', '\n{"file": "a.wav", "x": 1e999}\n', 'line 2 is not JSON: 1e999 is too large'),
    ('t.json', '[{"file": "a.wav"}]', 'named .csv, or JSON lines named .jsonl'), ('t.tsv', 'file\tx\na.wav\t1\n', 'named .csv, or JSON lines named .jsonl'), ('t.jsonl', '{"file": "a.wav", "x": NaN}\n', 'NaN is not JSON'), ('t.jsonl', b'{"file": "\xff.wav"}\n', 'not UTF-8')], ids=str)
def test_metadata_that_cannot_be_kept_whole(tmp_path, name, text, said):
    tone(tmp_path/'in/a.wav', .5)
    (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((FormatError, UsageError), match=said): precompute([tmp_path/'in'], tmp_path/'out', CONFIG, metadata=tmp_path/name, options=INLINE)
    assert not (tmp_path/'out').exists()


def test_which_files_validate(tmp_path):
    names = [f'{number}.wav' for number in range(2000)]
    parts = {fraction: {name for name in names if is_validation(name, fraction)} for fraction in (0, .1, .5, 1)}
    assert not parts[0] and 150 < len(parts[.1]) < 250 and parts[.1] < parts[.5] and parts[1] == {*names}
    assert [number for number in range(40) if is_validation(f'{number}.wav', .1)] == [11, 19, 31, 39]  # on every machine and in every version
    (tmp_path/'list.txt').write_text('3.wav\n\n 1.wav \n')
    assert split_names(names, val_list=tmp_path/'list.txt')['val'] == ['1.wav', '3.wav']
    (tmp_path/'list.txt').write_text('3.wav\nnowhere.wav\n')
    with pytest.raises(UsageError, match='nowhere.wav'): split_names(names, val_list=tmp_path/'list.txt')
    for wrong in (-.1, 1.1, float('nan')):
        with pytest.raises(UsageError, match='val_fraction'): split_names(names, wrong)


def test_finding_files(tmp_path):
    for name in ('in/b.wav', 'in/a/B.FLAC', 'other/a.wav', 'other/sub/c.ogg'): tone(tmp_path/name, .1)
    (tmp_path/'in/notes.txt').touch()
    (tmp_path/'in/folder.wav').mkdir()
    (tmp_path/'in/link').symlink_to(tmp_path/'other')
    (tmp_path/'other/sub/back').symlink_to(tmp_path/'in')
    left_out = Counter()
    assert [*find_audio(str(tmp_path/'in'), left_out)] == ['a/B.FLAC', 'b.wav', 'link/a.wav', 'link/sub/c.ogg'] and left_out == {'.txt': 1}
    assert [*find_audio([tmp_path/'in/notes.txt', tmp_path/'other'])] == ['a.wav', 'notes.txt', 'sub/back/a/B.FLAC', 'sub/back/b.wav', 'sub/c.ogg']
    with pytest.raises(UsageError, match="Two inputs have the name 'a.wav'"): find_audio([tmp_path/'other', tmp_path/'other/a.wav'])
    (tmp_path/'in/again').symlink_to(tmp_path/'in/a')
    (tmp_path/'in/third').symlink_to(tmp_path/'in/a')
    assert [*find_audio(tmp_path/'in')] == ['a/B.FLAC', 'b.wav', 'link/a.wav', 'link/sub/c.ogg']  # nothing twice, names without links
    for twice in ([tmp_path/'in', tmp_path/'in/a'], [tmp_path/'in/a', tmp_path/'in'], [tmp_path/'in', tmp_path/'other/sub']):
        with pytest.raises(UsageError, match='Two inputs hold one file'): find_audio(twice)
    for nothing in ([], [tmp_path/'in/folder.wav'], [tmp_path/'nowhere']):
        with pytest.raises(UsageError, match='inputs'): find_audio(nothing)


@pytest.mark.parametrize('options, said', [(dict(workers=-1), 'workers=-1'), (dict(workers='2'), "workers='2'"), (dict(workers=True), 'workers=True'), (dict(timeout=0.), 'timeout=0.0'), (dict(workers=0, timeout=5.), 'timeout=5.0')], ids=str)
def test_options_that_are_not_allowed(options, said):
    with pytest.raises(UsageError, match=said): PrecomputeOptions(**options)


@pytest.mark.parametrize('options, said', [(dict(durability='some'), 'durability'), (dict(map_size=1), 'map_size'), (dict(device='tpu'), 'device')], ids=str)
def test_options_that_the_store_or_torch_refuses(tmp_path, options, said):
    tone(tmp_path/'in/a.wav', .5)
    with pytest.raises(UsageError, match=said): precompute([tmp_path/'in'], tmp_path/'out', CONFIG, options=PrecomputeOptions(workers=0, **options))
    assert precompute([tmp_path/'in'], tmp_path/'out', CONFIG, 0., resume=True, options=INLINE)['train']['items'] == 1


def batches(sizes, workers, **options):
    "How many tasks may be under way, and how many files are in each"
    made = module._Batches([module.Task(str(number), (f'{number}.wav',)) for number in range(len(sizes))], sizes, **options)
    room, tasks = made.room(workers), [*made]
    assert [part.key for task in tasks for part in task.parts or [task]] == [str(number) for number in range(len(sizes))]
    return room, [len(task.arguments[0]) for task in tasks]


@pytest.mark.parametrize('megabytes, workers, wanted', [(1, 2, 8), (100, 16, 16), (100, 2, 4), (4000, 2, 2), (0, 1, 4)])
def test_the_spool_is_bounded(megabytes, workers, wanted):
    "Few long files wait, many short ones; every worker has one"
    sizes = [module._spectra_bytes('a.flac', size, STFTConfig()) for size in [0, megabytes << 20] * 50]
    assert module._spectra_bytes('a.flac', 9, STFTConfig(windows=(2048, 1024), dtype='float32')) > module._spectra_bytes('a.flac', 9, STFTConfig())
    assert batches(sizes, workers)[0] == wanted


def test_short_files_share_a_task_and_long_ones_do_not(monkeypatch):
    short, long = 10 ** 5, 10 ** 9
    assert batches([long] * 5, 1)[1] == [1] * 5 and batches([short] * 50, 2, seconds=0)[1] == [1] * 50
    counts = batches([short] * 20_000 + [long] + [short] * 20_000, 2)[1]
    assert max(counts) * (short / module.SPECTRA_RATE + module.FILE_SECONDS) <= module.TASK_SECONDS and len(counts) < 400
    monkeypatch.setattr(module, 'SPOOL_BYTES', 80 * short)
    assert max(batches([short] * 20_000, 2)[1]) == 10  # four tasks for each of two workers fit into the spool


@pytest.mark.parametrize('workers', [1, 2, 50])
def test_no_worker_is_without_work_at_the_end(workers):
    counts = batches([10 ** 5] * 200, workers)[1]
    assert max(counts) <= max(1, 200 / (4 * workers)) and counts[-1] == 1
