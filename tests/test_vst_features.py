"""Loudness and mel spectrogram against pyloudnorm and librosa, on signals that hypothesis thinks up."""
import math
import multiprocessing
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datatools.core import UsageError
from datatools.vst.features import MelSpectrogram, integrated_loudness, k_weighting, peak

RATES = [16000, 22050, 44100, 48000]
KINDS = ['noise', 'fading', 'burst', 'sine', 'offset', 'impulse', 'silence']


def signal(kind, channels, frames, sample_rate, level, seed):
    "float32 (channels, frames) of one kind; the second channel is another draw"
    rng = np.random.default_rng(seed)
    noise, moments = rng.normal(0, 0.2, (channels, frames)), np.arange(frames) / sample_rate
    if kind == 'fading': noise *= np.exp(-rng.uniform(1, 30) * moments)
    if kind == 'burst': noise[:, rng.integers(frames):] = 0
    if kind == 'sine': noise = np.sin(2 * np.pi * rng.uniform(20, 7000, (channels, 1)) * moments + rng.uniform(0, 6, (channels, 1)))
    if kind == 'offset': noise = np.full((channels, frames), 0.5)
    if kind == 'impulse':
        noise[:] = 0
        noise[rng.integers(channels), rng.integers(frames)] = 1
    if kind == 'silence': noise[:] = 0
    return (level * noise).astype(np.float32)


arguments = {'kind': st.sampled_from(KINDS), 'channels': st.integers(1, 2), 'sample_rate': st.sampled_from(RATES),
             'level': st.floats(-8, 3).map(lambda exponent: 10.0**exponent), 'seed': st.integers(0, 2**32)}


@settings(deadline=None, max_examples=150)
@given(tenths=st.integers(4, 30), **arguments)
def test_loudness_is_that_of_pyloudnorm(tenths, kind, channels, sample_rate, level, seed):
    pyloudnorm = pytest.importorskip('pyloudnorm')
    if kind == 'impulse': kind = 'noise'  # one sample can fall on either side of a block that pyloudnorm rounds
    audio = signal(kind, channels, tenths * sample_rate // 10, sample_rate, level, seed)
    measured = integrated_loudness(audio, sample_rate)
    for filters, allowed in [('DeMan', 0.005), ('K-weighting', 0.1 if sample_rate >= 44100 else 0.15)]:
        if filters == 'K-weighting' and kind not in ('noise', 'silence'): continue  # a block at the gate may fall on the other side
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            expected = pyloudnorm.Meter(sample_rate, filter_class=filters).integrated_loudness(audio.T.astype(float))
        if max(expected, measured) < -69.8: continue  # at the absolute gate
        assert measured == pytest.approx(expected, abs=allowed), filters


def gated_by_the_book(audio, sample_rate):
    "BS.1770-4 word for word: scipy's filters, blocks cut out one by one"
    from scipy.signal import lfilter
    weighted = audio.astype(float)
    for b0, b1, b2, a1, a2 in k_weighting(sample_rate): weighted = lfilter([b0, b1, b2], [1, a1, a2], weighted)
    step = sample_rate // 10
    powers = np.array([(weighted[:, i:i + 4 * step] ** 2).mean(1).sum() for i in range(0, audio.shape[1] - 4 * step + 1, step)])
    loud = powers[powers > 10**-6.9309]
    if not len(loud): return -math.inf
    loud = loud[loud > loud.mean() / 10]
    return -0.691 + 10 * math.log10(loud.mean())


@settings(deadline=None, max_examples=150)
@given(frames=st.integers(20_000, 60_000), **arguments)
def test_loudness_by_the_book(frames, kind, channels, sample_rate, level, seed):
    audio = signal(kind, channels, frames, sample_rate, level, seed)
    measured, expected = integrated_loudness(audio, sample_rate), gated_by_the_book(audio, sample_rate)
    assert measured == pytest.approx(expected, abs=1e-6) or max(measured, expected) < -69.999


@pytest.mark.parametrize('sample_rate', RATES)
def test_loudness_of_extremes(sample_rate):
    noise = signal('noise', 2, sample_rate, sample_rate, 1, 0)
    base = integrated_loudness(noise, sample_rate)
    assert integrated_loudness(noise * np.float32(2.0**100), sample_rate) == pytest.approx(base + 2000 * math.log10(2), abs=1e-6)
    assert integrated_loudness(noise * np.float32(1e-30), sample_rate) == -math.inf
    assert integrated_loudness(noise * 0, sample_rate) == -math.inf
    assert integrated_loudness(noise[:, :1], sample_rate) > -70


def test_trailing_part_of_a_block_does_not_count():
    audio = signal('noise', 2, 44100, 44100, 1, 3)
    louder = np.concatenate([audio, 100 * signal('noise', 2, 4409, 44100, 1, 4)], axis=1)
    assert integrated_loudness(louder, 44100) == integrated_loudness(audio, 44100)
    assert integrated_loudness(np.concatenate([louder, audio[:, :1]], axis=1), 44100) > integrated_loudness(audio, 44100) + 20


@pytest.mark.parametrize('sample_rate', [8000, 11025, 44101, 192000])
def test_loudness_at_odd_rates(sample_rate):
    wave = np.sin(2 * np.pi * 997 * np.arange(2 * sample_rate) / sample_rate).astype(np.float32)[None]
    assert integrated_loudness(wave, sample_rate) == pytest.approx(-3.01, abs=0.05)


def librosa_mel(audio, of):
    librosa = pytest.importorskip('librosa')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # short audio, empty bands
        power = librosa.feature.melspectrogram(y=audio, sr=of.sample_rate, n_fft=of.n_fft, hop_length=of.hop_length, window='hamming',
                                               n_mels=128, fmax=of.sample_rate / 2)
        return librosa.power_to_db(power, ref=np.max, top_db=80)


@settings(deadline=None, max_examples=150)
@given(frames=st.integers(1, 50_000), **arguments)
def test_mel_is_that_of_librosa(frames, kind, channels, sample_rate, level, seed):
    of = MelSpectrogram(sample_rate)
    if of.n_fft % 2 and frames % of.hop_length == 0: frames += 1  # librosa leaves out the last window of such audio
    audio = signal(kind, channels, frames, sample_rate, level, seed)
    mel, expected = of(audio), librosa_mel(audio, of)
    assert mel.dtype == np.float32 and mel.flags.c_contiguous
    assert mel.shape == of.shape(channels, frames) == expected.shape == (channels, 128, 1 + frames // (sample_rate // 100))
    assert np.abs(mel - expected).max() < 0.01
    assert mel.max() == 0 and mel.min() >= -80


@pytest.mark.parametrize('sample_rate', [8000, 11025, 32000, 44101, 44120, 96000, 192000])
def test_mel_at_odd_rates(sample_rate):
    of = MelSpectrogram(sample_rate)
    audio = signal('noise', 2, sample_rate // 3 + 1, sample_rate, 1, 0)
    assert np.abs(of(audio) - librosa_mel(audio, of)).max() < 0.01


@pytest.mark.parametrize('exponent', [-3, 1, 20, 64, 125])
def test_mel_does_not_depend_on_level(exponent):
    of, audio = MelSpectrogram(44100), signal('noise', 2, 20_000, 44100, 1, 0)
    assert np.abs(of(np.ldexp(audio, exponent)) - of(audio)).max() < 1e-3


def test_quiet_and_silent_audio_is_all_at_the_maximum():
    of, audio = MelSpectrogram(44100), signal('noise', 2, 5000, 44100, 1, 0)
    for factor in (0, 1e-45, 1e-38, 1e-10): assert not of(audio * np.float32(factor)).any()


def test_layout_in_memory_does_not_matter():
    of, audio = MelSpectrogram(44100), signal('fading', 2, 20_000, 44100, 1, 0)
    for other in (np.asfortranarray(audio), np.repeat(audio, 2, axis=1)[:, ::2]):
        assert not other.flags.c_contiguous
        assert (of(other) == of(audio)).all() and peak(other) == peak(audio)
        assert integrated_loudness(other, 44100) == integrated_loudness(audio, 44100)


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_peak(numbers):
    audio = np.array([numbers], np.float32)
    if np.isnan(audio).any(): assert math.isnan(peak(audio))
    else: assert peak(audio) == np.abs(audio).max()


@pytest.mark.parametrize('audio, message', [
    (np.zeros(100, np.float32), 'audio.shape'), (np.zeros((1, 2, 3), np.float32), 'audio.shape'), (np.float32(1), 'numpy array'),
    (np.zeros((2, 0), np.float32), 'at least one frame'), (np.zeros((0, 9), np.float32), 'audio.shape'),
    (np.zeros((3, 100), np.float32), 'audio.shape'), (np.zeros((100, 2), np.float32), r'audio\.T'),
    (np.zeros((2, 100), np.int16), 'float32'), (np.zeros((2, 100)), 'float32'), ([[0.0, 1.0]], 'numpy array'),
])
def test_wrong_audio_is_an_error(audio, message):
    for measure in (peak, MelSpectrogram(8000), lambda a: integrated_loudness(a, 44100)):
        with pytest.raises(UsageError, match=message): measure(audio)


@pytest.mark.parametrize('wrong', [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_an_error(wrong):
    audio = signal('noise', 2, 44100, 44100, 1, 0)
    audio[1, 44099] = wrong
    assert not math.isfinite(peak(audio))
    for measure in (MelSpectrogram(44100), lambda a: integrated_loudness(a, 44100)):
        with pytest.raises(UsageError, match='finite'): measure(audio)


@pytest.mark.parametrize('rate', [0, -44100, 7999, 44100.0, '44100', None, True, 10**7])
def test_wrong_sample_rate_is_an_error(rate):
    k_weighting(44100)  # 44100.0 is no key to what is remembered of it
    for measure in (MelSpectrogram, k_weighting, lambda r: integrated_loudness(np.zeros((2, 100), np.float32), r)):
        with pytest.raises(UsageError, match='sample_rate'): measure(rate)


def test_sample_rate_may_be_a_numpy_integer():
    audio, rate = signal('noise', 2, 44100, 16000, 1, 0), np.int16(16000)
    assert integrated_loudness(audio, rate) == integrated_loudness(audio, 16000)
    assert (MelSpectrogram(rate)(audio) == MelSpectrogram(16000)(audio)).all()
    assert MelSpectrogram(rate).sample_rate == 16000


def _measure(task):
    of, seed = task
    audio = signal('noise', 2, 44100, 44100, 1, seed)
    return integrated_loudness(audio, 44100), of(audio)


def test_same_results_in_forked_processes_and_threads():
    of = MelSpectrogram(44100)
    tasks = [(of, seed) for seed in range(8)]
    here = [_measure(task) for task in tasks]
    with ThreadPoolExecutor(4) as threads: in_threads = list(threads.map(_measure, tasks))
    with multiprocessing.get_context('fork').Pool(2) as pool: in_processes = pool.map(_measure, tasks)
    for others in (in_threads, in_processes):
        for (loudness, mel), (other_loudness, other_mel) in zip(here, others, strict=True):
            assert loudness == other_loudness and (mel == other_mel).all()


def test_module_stays_light(python):
    program = 'import sys, datatools.vst.features; print([m for m in ("torch", "librosa", "pyloudnorm", "scipy.signal") if m in sys.modules])'
    assert python('-c', program).stdout.strip() == '[]'
    assert len(pickle.dumps(MelSpectrogram(44100))) < 400_000
