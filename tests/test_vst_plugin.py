"The VST3 test instrument is what the other tests take it for: it sounds, it leaks, it fails as it is told to."
import faulthandler
import multiprocessing
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest
from mido import Message

pedalboard = pytest.importorskip('pedalboard')
FAILURES = ['None', 'Segfault', 'Abort', 'Exit', 'Hang', 'NaN', 'Silence', 'Leak']


class Loaded:
    "A plugin with its parameters by name; no warm-up note is played while it loads."
    def __init__(self, path):
        self.plugin = pedalboard.VST3Plugin(str(path), initialization_timeout=0)
        self.look_up()

    def look_up(self): self.parameters = {parameter.name: parameter for parameter in self.plugin._parameters}

    def set(self, **values):
        for name, value in values.items(): self.parameters[name.replace('_', ' ')].raw_value = value

    def play(self, channels=2, reset=False):
        "One second: C4 from 0.1 s to 0.5 s."
        notes = [Message('note_on', note=60, velocity=100, time=.1), Message('note_off', note=60, time=.5)]
        audio = self.plugin(notes, duration=1, sample_rate=44100, num_channels=channels, buffer_size=512, reset=reset)
        if reset: self.look_up()  # the plugin was made anew: parameters of the old one point into freed memory
        return audio


@pytest.fixture
def synth(test_plugin): return Loaded(test_plugin)


def forked(work, timeout=60):
    "What `work()` returns in a fork of this process, and the fork's exit code (None: it was killed after `timeout`)."
    def body(pipe):
        faulthandler.disable()  # the crash is asked for: no traceback of it
        pipe.send(work())
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=body, args=(sender,))
    child.start()
    sender.close()
    try: answer = receiver.recv() if receiver.poll(timeout) else None
    except EOFError: answer = None
    child.join(.1 if answer is None else timeout)
    if child.exitcode is None: child.kill()
    code = child.exitcode
    child.join()
    return answer, code


def memory(): return psutil.Process().memory_full_info().uss  # memory inherited from the parent counts once it is written to


def test_it_loads_and_sounds(synth):
    assert synth.plugin.is_instrument and len(synth.parameters) == len(synth.plugin._parameters) == 44
    audio = synth.play()
    assert audio.shape == (2, 44100) and audio.dtype == np.float32 and np.isfinite(audio).all()
    assert not audio[:, :4410].any() and audio[:, 4411:4500].any(), 'the note does not start on its frame'
    assert .05 < abs(audio).max() < 1 and abs(audio[0] - audio[1]).max() > .01
    synth.set(Volume=0)
    assert abs(synth.play()).max() < .02
    choices = synth.plugin.parameters['filter_type'].valid_values
    assert choices == ['Low Pass', 'Band Pass', 'High Pass', 'Notch']


def test_most_settings_are_audible(synth):
    rng, peaks = np.random.default_rng(0), []
    for _ in range(50):
        synth.set(**{name: rng.random() for name in list(synth.parameters)[:-3]})
        peaks.append(abs(synth.play(reset=True)).max())
    assert np.isfinite(peaks).all() and np.mean(np.array(peaks) > .001) > .8


def test_renders_leak_as_the_parameter_says(synth):
    synth.set(Leakage=0, Amplitude_Release=0, Delay_Mix=0)
    assert np.array_equal(synth.play(), synth.play())
    synth.set(Leakage=.5, Amplitude_Release=.4, Delay_Mix=.5)
    first, second, renewed = synth.play(reset=True), synth.play(), synth.play(reset=True)
    assert not np.array_equal(first, second) and np.array_equal(first, renewed)
    synth.set(Leakage=1)
    assert not np.array_equal(synth.play(reset=True), synth.play(reset=True))


@pytest.mark.parametrize('leakage', [0, .5, 1])
def test_forks_of_a_loaded_plugin_agree(synth, leakage):
    def other():
        synth.set(Filter_Cutoff=.9, Delay_Mix=1)
        return work()
    def work():
        synth.set(Leakage=leakage, Filter_Cutoff=.3, Delay_Mix=.4)
        return synth.play()
    answers = [forked(job) for job in (work, other, work)]
    assert [code for _, code in answers] == [0, 0, 0]
    assert all(np.array_equal(audio, answers[0][0]) for audio, _ in answers)


def test_nondeterminism(synth):
    def with_choice(value):
        def work():
            synth.set(Nondeterministic=value)
            return synth.play()
        return forked(work)[0]
    assert np.array_equal(with_choice(0), with_choice(0))
    assert not np.array_equal(with_choice(.5), with_choice(.5)), 'Clock'
    assert np.array_equal(with_choice(1), with_choice(1)) and not np.array_equal(with_choice(1), with_choice(0)), 'Address'


@pytest.mark.parametrize('choice,code', [('Segfault', -signal.SIGSEGV), ('Abort', -signal.SIGABRT), ('Exit', 3), ('Hang', None)])
def test_misbehaviour_ends_a_fork(synth, choice, code):
    def work():
        synth.set(Misbehave=FAILURES.index(choice) / 7)
        return synth.play()
    assert forked(work, timeout=.5 if code is None else 20) == (None, code)


def test_misbehaviour_in_the_audio(synth):
    def work(choice):
        synth.set(Misbehave=FAILURES.index(choice) / 7)
        before = memory()
        audio = synth.play(reset=True)
        return np.isnan(audio).any(), bool(audio.any()), (memory() - before) / 1e6
    assert forked(lambda: work('NaN'))[0][0]
    assert forked(lambda: work('Silence'))[0][:2] == (False, False)
    assert forked(lambda: work('Leak'))[0][2] > 45 and forked(lambda: work('None'))[0][2] < 20


def test_variants(plugin_variant, zam_plugin):
    mono = Loaded(plugin_variant('MONO'))
    assert mono.play(channels=1).shape == (1, 44100)
    with pytest.raises(ValueError, match='does not support 2-channel output'): mono.play()
    two = str(plugin_variant('TWO_PLUGINS'))
    with pytest.raises(ValueError, match='contains 2 plugins'): pedalboard.VST3Plugin(two)
    assert pedalboard.VST3Plugin(two, plugin_name=pedalboard.VST3Plugin.get_plugin_names_for_file(two)[1], initialization_timeout=0).is_instrument
    assert forked(lambda: pedalboard.VST3Plugin(str(zam_plugin)).is_instrument)[0] is False  # in a fork: built with -ffast-math, it changes the arithmetic of its process


def test_a_variant_crashes_while_it_loads(plugin_variant):
    load = 'import pedalboard, sys; pedalboard.VST3Plugin(sys.argv[1])'
    result = subprocess.run([sys.executable, '-c', load, plugin_variant('AT_LOAD=1')], capture_output=True, timeout=60)
    assert result.returncode == -signal.SIGSEGV
