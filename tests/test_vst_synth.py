"""The built-in synthesizer: finite and bounded on every setting, a pure function of its arguments, and the same bits everywhere."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from datatools.core import UsageError, rng_for
from datatools.vst.params import Note, load_param_set
from datatools.vst.synth import CONTROLS, BuiltinSynth

ROOT = Path(__file__).resolve().parent.parent
SOUND = 'b1b122744a2f6403d4967da9701b508f42c39127f16c6ebf3c5891b2c8eb2363'
raw_value = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1))
patches = st.fixed_dictionaries({name: raw_value for name in CONTROLS})
rates = st.sampled_from([8000, 11025, 22050, 44100, 48000, 96000, 192000])


@st.composite
def notes(draw):
    start = draw(st.floats(0, 0.3))
    return Note(draw(st.integers(0, 127)), draw(st.integers(1, 127)), start, start + draw(st.floats(1e-6, 0.4)))


def synth_of(values):
    synth = BuiltinSynth()
    synth.set_raw_values(values)
    return synth


def random_values(i): return dict(zip(CONTROLS, rng_for(11, i).random(len(CONTROLS))))


@settings(deadline=None, max_examples=300)
@given(patches, notes(), rates)
def test_finite_bounded_and_silent_before_the_note(values, note, rate):
    audio = synth_of(values).render([note], 0.5, rate)
    assert audio.shape == (2, rate // 2) and audio.dtype == np.float32
    assert np.isfinite(audio).all() and np.abs(audio).max() < 100
    assert not audio[:, :round(note.start * rate)].any()


@settings(deadline=None, max_examples=50)
@given(patches, notes())
def test_silent_after_the_release(values, note):
    values = values | dict(amplitude_release=0.2)
    release = CONTROLS['amplitude_release'].value(np.float32(0.2))
    audio = synth_of(values).render([note], 1.0, 22050)
    assert not audio[:, round((note.end + release) * 22050) + 32:].any()


@settings(deadline=None, max_examples=50)
@given(patches, patches, st.lists(notes(), max_size=4), rates)
def test_a_render_does_not_depend_on_what_came_before(values, earlier, played, rate):
    used = synth_of(earlier)
    used.render(played[:1], 0.1, 44100)
    used.set_raw_values(values)
    fresh = synth_of(values).render(played, 0.3, rate)
    assert np.array_equal(used.render(played[::-1], 0.3, rate), fresh)
    assert np.array_equal(used.render(played, 0.2, rate), fresh[:, :round(0.2 * rate)])


@settings(deadline=None, max_examples=50)
@given(patches, st.lists(notes(), min_size=1, max_size=4))
def test_chords_are_sums_and_mono_is_the_mean(values, played):
    synth = synth_of(values)
    together = synth.render(played, 0.5, 22050)
    alone = sum(synth.render([note], 0.5, 22050).astype(float) for note in played)
    assert np.allclose(together, alone, atol=1e-5, rtol=1e-5)
    mono = synth.render(played, 0.5, 22050, channels=1)
    assert mono.shape == (1, 11025) and np.allclose(mono[0], together.mean(0), atol=1e-5, rtol=1e-5)


def test_float32_values_give_the_same_sound():
    values = random_values(0)
    rounded = {name: float(np.float32(value)) for name, value in values.items()}
    note = [Note(60, 100, 0.0, 0.2)]
    assert synth_of(values).raw_values == rounded
    assert np.array_equal(synth_of(values).render(note, 0.3, 22050), synth_of(rounded).render(note, 0.3, 22050))


def test_threads_do_not_disturb_each_other():
    def render(i): return synth_of(random_values(i)).render([Note(48 + i, 100, 0.0, 0.5)], 0.6, 22050)
    with ThreadPoolExecutor(4) as pool: parallel = list(pool.map(render, range(24)))
    assert all(np.array_equal(audio, render(i)) for i, audio in enumerate(parallel))


@pytest.mark.parametrize('values, message', [
    (dict(filter_cutof=0.5), "Did you mean 'filter_cutoff'"), (dict(gain=1.5), 'gain=1.5'), (dict(gain=float('nan')), 'gain=nan'),
    (dict(gain=float('inf')), 'gain=inf'), (dict(gain='0.5'), "gain='0.5'"), (dict(gain=None), 'gain=None'), (dict(gain=True), 'gain=True'),
    ({7: 0.5}, 'parameter=7')])
def test_a_wrong_value_changes_nothing(values, message):
    synth = BuiltinSynth()
    with pytest.raises(UsageError) as error: synth.set_raw_values(dict(drive=0.9) | values)
    assert message in str(error.value) and synth.raw_values == BuiltinSynth().raw_values


@pytest.mark.parametrize('note', [Note(-1, 100, 0, 1), Note(128, 100, 0, 1), Note(60, 0, 0, 1), Note(60, 128, 0, 1), Note(60.0, 100, 0, 1),
    Note(60, 100, -0.1, 1), Note(60, 100, 1, 1), Note(60, 100, 1, 0.5), Note(60, 100, 0, float('inf')), Note(60, 100, float('nan'), 1),
    Note('60', 100, 0, 1), Note(True, 100, 0, 1), (60, 100, 0, 1), None])
def test_a_wrong_note_is_refused(note):
    with pytest.raises(UsageError, match='is not allowed'): BuiltinSynth().render([note], 1, 22050)


@pytest.mark.parametrize('options', [(0, 44100), (-1, 44100), (float('nan'), 44100), (1e9, 44100), (1e-6, 44100), ('1', 44100), (1, 0),
    (1, 7999), (1, 192001), (1, float('nan')), (1, '44100'), (1, 44100, 0), (1, 44100, 3), (1, 44100, True), (1, 44100, '2')])
def test_wrong_lengths_rates_and_channels_are_refused(options):
    with pytest.raises(UsageError, match='is not allowed'): BuiltinSynth().render([Note(60, 100, 0, 1)], *options)


def test_numpy_numbers_are_numbers():
    values = {name: np.float32(value) for name, value in random_values(3).items()}
    audio = synth_of(values).render([Note(np.int16(60), np.int16(100), np.float32(0), np.float64(0.1))], np.float64(0.2), np.int64(22050), np.int64(2))
    assert np.array_equal(audio, synth_of(values).render([Note(60, 100, 0.0, 0.1)], 0.2, 22050))


def test_every_patch_of_the_shipped_set_can_be_set():
    spec, synth = load_param_set('builtin'), BuiltinSynth()
    assert set(spec.names) == set(synth.names)
    for i in range(200): synth.set_raw_values(spec.sample(rng_for(5, i)).parameters)


@pytest.mark.parametrize('environment', [{}, dict(NUMBA_CPU_NAME='generic', NUMBA_CPU_FEATURES=''), dict(NUMBA_OPT='0'), dict(NUMBA_OPT='1'),
    dict(NUMBA_DISABLE_JIT='1')], ids=['as it is', 'any processor', 'not optimised', 'hardly optimised', 'plain Python'])
def test_the_same_bits_whatever_the_compiler_does(environment, tmp_path):
    code = 'from datatools.vst.synth import BuiltinSynth; print(BuiltinSynth().identity()["sha256"])'
    environment = os.environ | environment | dict(NUMBA_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == SOUND, done.stderr[-2000:]


def test_importing_compiles_nothing():
    code = 'import datatools.vst.synth as s; print([f.__name__ for f in vars(s).values() if hasattr(f, "signatures") and f.signatures])'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='fork does not exist here')
def test_a_forked_process_need_not_compile():
    code = '''
import os, sys
from datatools.vst.params import Note
from datatools.vst.synth import BuiltinSynth, _play
synth = BuiltinSynth()
synth.warm_up()
compiled = len(_play.signatures)
if (child := os.fork()) == 0:
    synth.render([Note(60, 100, 0, 0.1)], 0.2, 44100)
    os._exit(0 if len(_play.signatures) == compiled == 1 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
