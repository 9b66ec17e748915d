"""Chunk files: killed anywhere, nothing is lost and the final bytes are the same; damage is named, never passed on."""
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from datatools.core import DatatoolsError, FormatError, MismatchError, clean_temporaries, rng_for
from datatools.vst import chunks
from datatools.vst.chunks import COMPRESSIONS, CONTENT, ChunkLayout, PartialChunk, check_chunk, to_float16

SAMPLES = 5


def layout_of(samples=SAMPLES, frames=300):
    return ChunkLayout(samples, 2, frames, (2, 128, 2), 4, first=10, chunk=2, sample_rate=8000, duration_seconds=frames / 8000, param_set='test')


def sample(i, layout):
    "Random content of sample i"
    rng = rng_for(7, i)
    return dict(audio=rng.uniform(-1, 1, (layout.channels, layout.frames)).astype(np.float32), mel=rng.uniform(-80, 0, layout.mel_shape).astype(np.float32),
                param_array=rng.random(layout.param_count, np.float32), midi_note=int(rng.integers(128)), velocity=int(rng.integers(128)),
                note_start_end=tuple(rng.random(2)), loudness=float(rng.uniform(-55, 0)), attempt=int(rng.integers(100)), rejections=rng.integers(100, size=5),
                phrase=int(rng.integers(-1, 50)))


def describe(vector, row): return json.dumps({'größe': float(vector[0]), 'row': row}, ensure_ascii=False)


def fill(partial, rows=None):
    for row in np.flatnonzero(~partial.done) if rows is None else rows: partial.write(int(row), **sample(int(row), partial.layout))


def make(folder, name='dataset_0002.h5', layout=None, compression='none'):
    "A final chunk in one go"
    partial = PartialChunk.create(folder / f'{name}.partial', layout or layout_of(), 'hash')
    fill(partial)
    return partial.finish(folder / name, describe, compression)


def work(folder):
    "What a worker does from any state of the folder: start or go on, render what is missing, finish"
    final, part = folder / 'dataset_0002.h5', folder / 'dataset_0002.h5.partial'
    clean_temporaries(folder)
    if final.exists(): return part.unlink(missing_ok=True)
    partial = PartialChunk.open(part, layout_of(), 'hash') if part.exists() else PartialChunk.create(part, layout_of(), 'hash')
    fill(partial)
    partial.finish(final, describe)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    return make(tmp_path_factory.mktemp('reference')).read_bytes()


def in_child(function):
    "Run a function in a forked child; its wait status"
    child = os.fork()
    if child: return os.waitpid(child, 0)[1]
    try: function()
    except BaseException as error:  # noqa: BLE001  whatever it is, the child must not go on with the parent's tests
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def killed_after(lines, function, packages):
    "Run a function, and kill the process by SIGKILL at the given line, counting those of the packages"
    left = [lines]

    def trace(frame, event, _):
        if not any(f'{os.sep}{package}{os.sep}' in frame.f_code.co_filename for package in packages): return None
        if event == 'line':
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    function()
    sys.settrace(None)


def kill_drill(folder, reference, step, packages):
    "Kill a worker after 1, 1 + step, … lines; every time the state is sound and work ends in the same bytes"
    points, lines, names = 0, 1, set()
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        status = in_child(lambda: killed_after(lines, lambda: work(folder), packages))
        final, part = folder / 'dataset_0002.h5', folder / 'dataset_0002.h5.partial'
        names.add((final.exists(), part.exists()))
        if final.exists(): assert final.read_bytes() == reference
        elif part.exists():
            with h5py.File(part) as file: flagged = file['done'][:]
            with PartialChunk.open(part, layout_of(), 'hash') as partial:
                assert (partial.done == flagged).all(), 'a kill must not flag a sample that is not whole'
                for row in np.flatnonzero(flagged):
                    stored = partial.read(row)
                    assert (stored['audio'] == sample(row, layout_of())['audio'].astype(np.float16)).all() and stored['attempt'] == sample(row, layout_of())['attempt']
        work(folder)
        assert final.read_bytes() == reference and os.listdir(folder) == [final.name]
        if status == 0: return points, names
        assert os.WTERMSIG(status) == signal.SIGKILL
        points, lines = points + 1, lines + step


ALL_STATES = {(False, False), (False, True), (True, True), (True, False)}  # final file there, partial there


@pytest.fixture
def fast_folder(tmp_path):
    "A folder in memory where there is one: a drill syncs thousands of files"
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else tmp_path) as name: yield Path(name) / 'x'


def test_killed_at_many_lines(fast_folder, reference):
    points, _ = kill_drill(fast_folder, reference, 211, ('datatools', 'h5py'))
    assert points > 15


@pytest.mark.drill
def test_killed_at_every_other_line(fast_folder, reference):
    points, states = kill_drill(fast_folder, reference, 2, ('datatools',))
    assert points > 400 and states == ALL_STATES


@pytest.mark.drill
def test_killed_at_many_lines_of_h5py(fast_folder, reference):
    points, _ = kill_drill(fast_folder, reference, 37, ('datatools', 'h5py'))
    assert points > 100


def test_killed_between_any_two_system_calls_of_a_write(tmp_path, monkeypatch, reference):
    "Also in the middle of the data: the kernel takes the first half of a block, then the process dies"
    part, written = tmp_path / 'dataset_0002.h5.partial', os.pwrite
    PartialChunk.create(part, layout_of(), 'hash').close()
    for call in range(1, SAMPLES * (len(CONTENT) + 2), 3):
        left = [call]

        def dying(descriptor, data, offset):
            left[0] -= 1
            if left[0]: return written(descriptor, data, offset)
            written(descriptor, data[:len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        monkeypatch.setattr(os, 'pwrite', dying)
        assert in_child(lambda: fill(PartialChunk.open(part, layout_of(), 'hash'), reversed(range(SAMPLES)))) == signal.SIGKILL
        monkeypatch.setattr(os, 'pwrite', written)
    with PartialChunk.open(part, layout_of(), 'hash') as partial: assert partial.done.sum() == SAMPLES - 1  # all but the one it died in, over and over
    work(tmp_path)
    assert (tmp_path / 'dataset_0002.h5').read_bytes() == reference


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(SAMPLES)), st.sets(st.integers(0, SAMPLES)), st.lists(st.integers(0, SAMPLES - 1), max_size=3), st.booleans())
def test_bytes_do_not_depend_on_order_interruptions_or_rewrites(reference, order, stops, again, halves):
    with tempfile.TemporaryDirectory() as name:
        part = Path(name) / 'x.partial'
        partial = PartialChunk.create(part, layout_of(), 'hash')
        for k, row in enumerate([*order, *again]):
            if k in stops:
                partial.close()
                partial = PartialChunk.open(part, layout_of(), 'hash')
            content = sample(row, layout_of())
            if halves: content['audio'] = content['audio'].astype(np.float16)
            partial.write(row, **content)
        assert partial.finish(Path(name) / 'x.h5', describe).read_bytes() == reference


@pytest.mark.parametrize('compression', COMPRESSIONS)
def test_final_file_is_the_published_layout(tmp_path, compression):
    layout = layout_of(samples=70)  # more than one block of small fields
    final = make(tmp_path, layout=layout, compression=compression)
    assert check_chunk(final, layout) == [] and ChunkLayout.read(final) == layout
    if compression == 'blosc2': import hdf5plugin  # noqa: F401
    with h5py.File(final) as file:
        n = layout.samples
        assert {name: (file[name].dtype.name, file[name].shape) for name in CONTENT} == dict(
            audio=('float16', (n, 2, 300)), mel_spec=('float32', (n, 2, 128, 2)), param_array=('float32', (n, 4)), midi_notes=('int16', (n,)),
            velocities=('int16', (n,)), note_start_end=('float64', (n, 2)), loudness=('float32', (n,)), attempt=('int32', (n,)), rejections=('uint16', (n, 5)),
            phrase=('int32', (n,)))
        assert file['done'].dtype == bool and file['done'][:].all() and file['audio'].chunks == (1, 2, 300)
        assert dict(file['audio'].attrs) == dict(velocity=100, signal_duration_seconds=300 / 8000, sample_rate=8000, min_loudness=-55)
        assert {name: file.attrs[name] for name in ('chunk_id', 'num_samples', 'sample_rate', 'duration_seconds', 'param_set')} == dict(
            chunk_id=2, num_samples=n, sample_rate=8000, duration_seconds=300 / 8000, param_set='test')
        for row in (0, 63, 64, 69):
            content = sample(row, layout)
            assert (file['audio'][row] == content['audio'].astype(np.float16)).all() and (file['mel_spec'][row] == content['mel']).all()
            assert file['midi_notes'][row] == content['midi_note'] and file['phrase'][row] == content['phrase'] and file['loudness'][row] == np.float32(content['loudness'])
            assert file['parameters'].asstr()[row] == describe(content['param_array'], row)


def test_blosc2_is_imported_only_when_it_is_used(tmp_path):
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; import test_vst_chunks as t; t.make(Path(sys.argv[1])); assert "hdf5plugin" not in sys.modules'
    subprocess.run([sys.executable, '-c', code, tmp_path], check=True, timeout=120)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6))
def test_a_truncated_file_is_named(reference, cut):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / 'x.h5'
        path.write_bytes(reference[:cut % len(reference)])
        assert len(problems := check_chunk(path)) == 1 and 'x.h5' in problems[0]
        partial = PartialChunk.create(Path(name) / 'y.partial', layout_of(), 'hash')
        partial.close()
        os.truncate(partial.path, cut % os.path.getsize(partial.path))
        with pytest.raises(FormatError, match='y.partial'): PartialChunk.open(partial.path, layout_of(), 'hash')


def content_of(path):
    "All that a reader would take from a file"
    with h5py.File(path) as file: return {name: file[name][:].tolist() for name in (*CONTENT, 'parameters')}


def flip_in_final(folder, content, wanted, bit):
    "A flipped bit is named, or changes nothing that is read; runs in a child, as h5py may not survive it"
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    path = folder / 'x.h5'
    path.write_bytes(damaged)

    def look():
        if not check_chunk(path, layout_of()): assert content_of(path) == wanted
    return in_child(look)


def flip_many(tmp_path, reference, count):
    (tmp_path / 'whole.h5').write_bytes(reference)
    wanted, rng = content_of(tmp_path / 'whole.h5'), random.Random(3)
    bits = [rng.randrange(8 * len(reference)) for _ in range(count)]
    structure = [k for k in range(8 * len(reference)) if k % 997 == 0][:count]  # the beginning of the file too: superblock and headers
    assert [bit for bit in bits + structure if flip_in_final(tmp_path, reference, wanted, bit)] == []


def test_a_flipped_bit_in_a_final_file(tmp_path, reference): flip_many(tmp_path, reference, 60)


@pytest.mark.drill
def test_many_flipped_bits_in_a_final_file(tmp_path, reference): flip_many(tmp_path, reference, 1000)


def test_a_flipped_bit_in_a_partial_file_costs_that_sample_only(tmp_path):
    part = tmp_path / 'x.partial'
    with PartialChunk.create(part, layout_of(), 'hash') as partial:
        fill(partial)
        offsets, sizes, whole = partial._offsets, {name: kind[2] for name, kind in partial._types.items()}, part.read_bytes()
    for name in (*CONTENT, 'checksum'):
        damaged = bytearray(whole)
        damaged[offsets[name] + 3 * sizes[name] + sizes[name] // 2] ^= 16
        part.write_bytes(damaged)
        with PartialChunk.open(part, layout_of(), 'hash') as partial: assert partial.done.tolist() == [True, True, True, False, True]
        with h5py.File(part) as file: assert file['done'][:].tolist() == [True, True, True, False, True]


def test_damage_while_the_partial_is_open_stops_finish(tmp_path):
    partial = PartialChunk.create(tmp_path / 'x.partial', layout_of(), 'hash')
    fill(partial)
    with open(partial.path, 'r+b') as file:
        file.seek(partial._offsets['mel_spec'] + 5000)
        file.write(b'\1\2\3\4')
    with pytest.raises(FormatError, match='sample 2 is damaged'): partial.finish(tmp_path / 'x.h5', describe)
    assert os.listdir(tmp_path) == ['x.partial']
    partial.close()
    with PartialChunk.open(partial.path, layout_of(), 'hash') as partial: assert partial.done.sum() == SAMPLES - 1


@pytest.mark.parametrize('name, value', [('samples', 6), ('frames', 301), ('mel_shape', (2, 128, 3)), ('param_count', 5), ('first', 11), ('chunk', 3),
                                         ('sample_rate', 44100), ('velocity', 99), ('min_loudness', -60.0), ('param_set', 'other')])
def test_another_layout_is_refused_by_name(tmp_path, name, value):
    PartialChunk.create(tmp_path / 'x.partial', layout_of(), 'hash').close()
    with pytest.raises(MismatchError, match=name): PartialChunk.open(tmp_path / 'x.partial', ChunkLayout(**{**layout_of().__dict__, name: value}), 'hash')
    assert any(name in problem for problem in check_chunk(make(tmp_path), ChunkLayout(**{**layout_of().__dict__, name: value})))


def test_a_chunk_of_another_configuration_is_named(tmp_path):
    final = make(tmp_path)
    assert check_chunk(final, layout_of(), config_hash='hash') == []
    for deep in (True, False): assert check_chunk(final, layout_of(), deep, 'other') == ['belongs to another data set: its config_hash is hash, not other']
    with h5py.File(final, 'r+') as file: del file.attrs['config_hash']
    assert check_chunk(final, layout_of(), config_hash='other') == []


def test_wrong_content_is_refused_and_nothing_is_written(tmp_path):
    with PartialChunk.create(tmp_path / 'x.partial', layout_of(), 'hash') as partial:
        before = partial.path.read_bytes()
        for name, value in dict(audio=np.zeros((2, 299)), mel=np.zeros((2, 128, 3)), param_array=[1, 2, 3], note_start_end=(1,)).items():
            with pytest.raises(ValueError, match='shape'): partial.write(0, **{**sample(0, layout_of()), name: value})
        for audio in (np.full((2, 300), np.nan), np.full((2, 300), 1e6)):
            with pytest.raises(ValueError, match='audio'): partial.write(0, **{**sample(0, layout_of()), 'audio': audio})
        for row in (-1, SAMPLES):
            with pytest.raises(ValueError, match='row'): partial.write(row, **sample(0, layout_of()))
        assert partial.path.read_bytes() == before
        with pytest.raises(DatatoolsError, match='5 of 5'): partial.finish(tmp_path / 'x.h5', describe)


def test_half_precision_rounds_like_numpy():
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    for values in (halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9)), np.array([1e-45, 65519.996], np.float32)):
        for signed in (values, -values): assert (to_float16(signed).view(np.uint16) == signed.astype(np.float16).view(np.uint16)).all()


def limited(size, function):
    "Run a function in a child whose files cannot grow beyond `size` bytes"
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        function()
    return in_child(run)


def expect_oserror(path, function):
    with pytest.raises(OSError) as caught: function()
    assert path.name in str(caught.value) and caught.value.errno is not None, caught.value


def test_full_disk_when_a_partial_is_made(tmp_path):
    part = tmp_path / 'x.partial'
    for size in (100, 3000, 10_000): assert limited(size, lambda: expect_oserror(part, lambda: PartialChunk.create(part, layout_of(), 'hash'))) == 0
    assert os.listdir(tmp_path) == []


def test_full_disk_when_a_chunk_is_finished(tmp_path, reference):
    partial = PartialChunk.create(tmp_path / 'x.partial', layout_of(), 'hash')
    fill(partial)
    whole, final = partial.path.read_bytes(), tmp_path / 'x.h5'
    for size in (0, 100, 2000, 5000, len(reference) // 2, len(reference) - 1):
        def attempt():
            expect_oserror(final, lambda: partial.finish(final, describe))
            assert os.listdir(tmp_path) == ['x.partial']
        assert limited(size, attempt) == 0, size
    assert partial.path.read_bytes() == whole
    assert partial.finish(final, describe).read_bytes() == reference


@contextmanager
def small_disk(path, size):
    "A memory disk of `size` bytes; skips where it cannot be mounted"
    path.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', path], capture_output=True, text=True) if os.geteuid() == 0 else None
    if mounted is None or mounted.returncode: pytest.skip(f'a small disk needs the right to mount one: {mounted.stderr.strip() if mounted else "not root"}')
    try: yield path
    finally: subprocess.run(['umount', '-l', path], check=True)


def test_on_a_really_full_disk(tmp_path, reference):
    with small_disk(tmp_path / 'disk', '128k') as disk:
        partial = PartialChunk.create(disk / 'x.partial', layout_of(), 'hash')
        fill(partial)
        (disk / 'ballast').write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - 8192))
        expect_oserror(disk / 'x.h5', lambda: partial.finish(disk / 'x.h5', describe))
        expect_oserror(disk / 'y.partial', lambda: PartialChunk.create(disk / 'y.partial', layout_of(), 'hash'))
        assert sorted(os.listdir(disk)) == ['ballast', 'x.partial']
        (disk / 'ballast').unlink()
        assert partial.finish(disk / 'x.h5', describe).read_bytes() == reference


def test_on_a_read_only_disk(tmp_path, reference):
    with small_disk(tmp_path / 'disk', '1m') as disk:
        with PartialChunk.create(disk / 'x.partial', layout_of(), 'hash') as partial: fill(partial)
        final = make(disk, 'done.h5')
        subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
        expect_oserror(disk / 'y.partial', lambda: PartialChunk.create(disk / 'y.partial', layout_of(), 'hash'))
        expect_oserror(disk / 'x.partial', lambda: PartialChunk.open(disk / 'x.partial', layout_of(), 'hash'))
        assert check_chunk(final, layout_of()) == []


def test_memory_stays_small(tmp_path):
    code = '''
import sys; sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_vst_chunks as t
from datatools.core import peak_rss_bytes, rss_bytes
layout = t.layout_of(samples=64, frames=500_000)
t.make(Path(sys.argv[1]), 'warm.h5', t.layout_of())
before = rss_bytes()
t.make(Path(sys.argv[1]), layout=layout)
print((peak_rss_bytes() - before) / 2_000_000)
'''
    done = subprocess.run([sys.executable, '-c', code, tmp_path, Path(__file__).parent], check=True, timeout=120, capture_output=True, text=True)
    assert float(done.stdout) < 12, f'{done.stdout} samples of 64 in memory'


def test_files_of_other_programs_with_six_datasets(tmp_path):
    with h5py.File(tmp_path / 'x.h5', 'w') as file:
        file['audio'], file['mel_spec'], file['param_array'] = np.zeros((3, 2, 40), np.float16), np.zeros((3, 2, 128, 2), np.float32), np.zeros((3, 4), np.float32)
        file['parameters'], file['midi_notes'], file['velocities'] = ['{}'] * 3, np.zeros(3, np.int16), np.zeros(3, np.int16)
        file['audio'].attrs.update(velocity=100, signal_duration_seconds=0.1, sample_rate=400.0, min_loudness=-55.0)
    assert check_chunk(tmp_path / 'x.h5') == [] and ChunkLayout.read(tmp_path / 'x.h5').samples == 3
    with h5py.File(tmp_path / 'x.h5', 'r+') as file: del file['mel_spec'].parent['midi_notes']
    assert check_chunk(tmp_path / 'x.h5') == ['midi_notes is missing']


def test_version_of_the_future(tmp_path):
    final = make(tmp_path)
    with h5py.File(final, 'r+') as file: file.attrs['format_version'] = chunks.VERSION + 1
    assert 'newer' in check_chunk(final)[0]
