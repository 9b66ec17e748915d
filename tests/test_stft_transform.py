"""Audio files and their STFTs: exact round trips, agreement with librosa and SciPy, and files of every kind of badness."""
import errno
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
import warnings

import librosa
import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datatools.core import FormatError, UsageError
from datatools.stft.audio import BLOCK_FRAMES, AudioReader, read_audio
from datatools.stft.transform import (
    DTYPES, STFTConfig, _transform_on_device, audio_segments, checked_device, from_magnitude_phase, istft, pack, packed_shape, packed_stft,
    snr_decibels, spectrum_view, stft, stft_fields, unpack)

RATE = 44100


def sound(samples, channels=1, level=1.0, seed=0):
    "float32 (channels, samples): noise that fades, and a tone"
    rng = np.random.default_rng(seed)
    moments = np.arange(samples) / RATE
    audio = rng.normal(0, 0.2, (channels, samples)) * np.exp(-rng.uniform(0, 20) * moments) + 0.3 * np.sin(rng.uniform(100, 9e4) * moments)
    return (level * audio).astype(np.float32)


# The transform

@st.composite
def transforms(draw, longest_hop=4):
    "window, hop_length, samples: any even window, hops up to a part of it, from one sample on"
    window = 2 * draw(st.one_of(st.integers(4, 700), st.sampled_from([128, 256, 512, 1024, 2048])))
    return window, draw(st.integers(max(1, window // 64), window // longest_hop)), draw(st.integers(1, 9000))


sounds = {'channels': st.integers(1, 2), 'level': st.floats(-12, 4).map(lambda exponent: 10.0**exponent), 'seed': st.integers(0, 2**32)}


@settings(deadline=None, max_examples=80)
@given(transform=transforms(), dtype=st.sampled_from(DTYPES), **sounds)
def test_round_trip_to_audio(transform, dtype, channels, level, seed):
    window, hop, samples = transform
    audio = sound(samples, channels, level, seed)
    array, scale = packed_stft(audio, window, hop, dtype)
    assert array.shape == packed_shape(channels, samples, window, hop, dtype) and array.dtype == dtype
    restored = istft(unpack(array, scale), hop, samples).numpy()
    assert restored.shape == audio.shape
    assert snr_decibels(audio, restored) > (60 if dtype == 'float16' else 110)  # of long audio, 73 and more


@settings(deadline=None, max_examples=80)
@given(transform=transforms(longest_hop=1), **sounds)
def test_one_pass_equals_step_by_step(transform, channels, level, seed):
    window, hop, samples = transform
    audio = sound(samples, channels, level, seed)
    whole = stft(audio, window, hop).numpy()
    tolerance = np.abs(audio).max() * window / 2
    for dtype in DTYPES:
        back = unpack(*packed_stft(audio, window, hop, dtype)).numpy()
        assert np.abs(back - whole).max() <= tolerance * (2**-11 if dtype == 'float16' else 2e-7)


@settings(deadline=None, max_examples=60)
@given(transform=transforms(longest_hop=1), **sounds)
def test_agrees_with_librosa_and_scipy(transform, channels, level, seed):
    window, hop, samples = transform
    audio = sound(samples, channels, level, seed)
    spectrum = unpack(*packed_stft(audio, window, hop, 'float32')).numpy()
    tolerance = np.abs(audio).max() * window * 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # librosa warns of a window longer than the audio
        expected = librosa.stft(audio, n_fft=window, hop_length=hop, pad_mode='constant')
    np.testing.assert_allclose(spectrum, expected, rtol=0, atol=tolerance)
    if hop == window: return  # SciPy wants an overlap
    padded = np.pad(audio, ((0, 0), (window // 2, window // 2)))
    _, _, scipys = scipy.signal.stft(padded, nperseg=window, noverlap=window - hop, boundary=None, padded=False)
    np.testing.assert_allclose(spectrum, scipys * window / 2, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=60)
@given(exponent=st.integers(-149, 127), mantissa=st.floats(1, 2, exclude_max=True), **sounds)
def test_packing_never_overflows_and_is_stable(exponent, mantissa, channels, level, seed):
    spectrum = stft(sound(900, channels, 1.0, seed), 256, 64)
    spectrum = spectrum / torch.view_as_real(spectrum).abs().max() * float(np.float32(mantissa * 2.0**min(exponent, 125)))
    array, scale = pack(spectrum)
    assert np.isfinite(array).all() and np.abs(array).max() <= 32768
    assert np.frexp(scale)[0] == 0.5 and scale >= 2.0**-126  # a power of two
    if exponent < -90: return  # what is small beside that is below the smallest float32
    again, scale_again = pack(unpack(array, scale))
    assert np.array_equal(again, array) and scale_again == scale


@pytest.mark.parametrize('level', [1e-45, 1e-38, 1e-20, 1.0, 1e9, 1e30, 1e35])
def test_any_finite_audio_can_be_packed(level):
    square = np.where(np.arange(20_000) // 50 % 2, 1, -1)[None] * np.float32(level)
    constant = np.full((1, 20_000), level, np.float32)
    for audio in (square.astype(np.float32), constant, -constant):
        array, scale = packed_stft(audio, 2048, 512)
        assert np.isfinite(array).all() and np.abs(array).max() <= 32768
        assert np.isfinite(unpack(array, scale).numpy()).all()


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize('dtype', DTYPES)
def test_what_is_not_finite_is_refused(value, dtype):
    audio = sound(5000)
    audio[0, 4999] = value
    with pytest.raises(UsageError, match='finite'): packed_stft(audio, 2048, 512, dtype)
    spectrum = stft(sound(5000), 2048, 512)
    spectrum[0, 3, 2] = complex(0, value)
    with pytest.raises(UsageError, match='finite'): pack(spectrum, dtype)


def test_silence_and_a_single_sample():
    array, scale = packed_stft(np.zeros((1, 3000), np.float32), 2048, 512)
    assert not array.any() and scale == 1
    audio = np.array([[0.25]], np.float32)
    assert istft(unpack(*packed_stft(audio, 64, 16)), 16, 1).numpy() == pytest.approx(0.25, rel=1e-3)


def test_a_given_buffer_is_filled():
    audio = sound(30_000, channels=2)
    expected, scale = packed_stft(audio, 512, 128)
    memory = bytearray(expected.nbytes + 64)
    out = np.frombuffer(memory, np.float16, expected.size, offset=64).reshape(expected.shape)
    array, scale_again = packed_stft(audio, 512, 128, out=out)
    assert array is out and scale_again == scale and memory[64:] == expected.tobytes() and not any(memory[:64])
    for wrong in (out[..., :1], out.astype(np.float32), out[:, ::-1]):
        with pytest.raises(UsageError, match='out='): packed_stft(audio, 512, 128, out=wrong)


def test_same_bytes_wherever_the_audio_lies_and_whatever_came_before():
    expected = packed_stft(sound(44_100), 2048, 512)[0].tobytes()
    for offset in range(1, 20, 3):
        memory = np.empty(44_100 + offset, np.float32)
        memory[offset:] = sound(44_100)[0]
        packed_stft(sound(1000 * offset), 512, 128)
        torch.set_num_threads(1 + offset % 2)
        assert packed_stft(memory[None, offset:], 2048, 512)[0].tobytes() == expected
        assert torch.get_num_threads() == 1 + offset % 2


def test_same_bytes_in_another_process(python, tmp_path):
    np.save(tmp_path/'audio.npy', sound(44_100))
    found = python('-c', 'import sys, numpy as np, hashlib\nfrom datatools.stft.transform import packed_stft\n'
                   'print(hashlib.sha256(packed_stft(np.load(sys.argv[1]), 2048, 512)[0]).hexdigest())', tmp_path/'audio.npy')
    assert found.stdout.strip() == hashlib.sha256(packed_stft(sound(44_100), 2048, 512)[0]).hexdigest(), found.stderr


def test_works_in_a_forked_process(python):
    found = python('-c', 'import os, numpy as np, torch\nfrom datatools.stft.transform import packed_stft\n'
                   'torch.set_num_threads(2); torch.rand(2000, 2000) @ torch.rand(2000, 2000); torch.rand(10**7).exp()\n'
                   'audio = np.random.default_rng(0).normal(0, 0.1, (1, 200_000)).astype(np.float32)\n'
                   'expected = packed_stft(audio, 2048, 512)[0].tobytes()\n'
                   'child = os.fork()\n'
                   'if not child: os._exit(7 if packed_stft(audio, 2048, 512)[0].tobytes() == expected else 8)\n'
                   'print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))')
    assert found.stdout.strip() == '7', found.stderr


def test_audio_that_runs_backwards():
    audio = sound(5000)
    audio.flags.writeable = False
    for turned in (audio[:, ::-1], audio.repeat(2, axis=1)[:, ::-2]):
        assert (packed_stft(turned, 256, 64)[0] == packed_stft(turned.copy(), 256, 64)[0]).all()
        assert torch.equal(stft(turned, 256, 64), stft(turned.copy(), 256, 64))


def test_read_only_and_stacked_arrays_unpack_without_a_warning():
    packed = [packed_stft(sound(8000, level=10.0**-k), 512, 128) for k in range(3)]
    stacked, scales = np.stack([array for array, _ in packed]), np.array([scale for _, scale in packed])
    stacked.flags.writeable = scales.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        spectra = unpack(stacked, scales)
        assert all(torch.equal(spectrum, unpack(*one)) for spectrum, one in zip(spectra, packed))
        assert torch.equal(unpack(torch.from_numpy(stacked.copy()), torch.tensor(scales.copy())), spectra)


def test_views_of_batches():
    spectra = unpack(np.stack([packed_stft(sound(8000, 2, seed=k), 512, 128)[0] for k in range(3)]))
    view = spectrum_view(spectra, 'magnitude_phase')
    assert view.shape == (3, 2, 3, 257, 63) and torch.allclose(from_magnitude_phase(view), spectra, atol=1e-2)
    assert torch.equal(view[:, :, 0], spectrum_view(spectra, 'magnitude')) and spectrum_view(spectra) is spectra
    assert not torch.isnan(spectrum_view(torch.zeros(1, 5, 5, dtype=torch.complex64), 'magnitude_phase')).any()


def test_inverse_refuses_what_it_cannot_do_well():
    with pytest.raises(UsageError, match='at most 512'): istft(stft(sound(1023), 2048, 1024), 1024, 1023)
    with pytest.raises(UsageError, match='at most 512'): istft(stft(sound(4096), 2048, 2048), 2048, 4096)
    with pytest.raises(UsageError, match='samples'): istft(stft(sound(4096), 2048, 512), 512, 4096 + 512)


def test_a_device_that_is_not_there_is_refused():
    assert checked_device('cpu').type == 'cpu'
    for wrong in ('tape', 'meta', f'cuda:{torch.cuda.device_count() if torch.cuda.is_available() else 0}'):
        with pytest.raises(UsageError, match='device'): packed_stft(sound(5000), 2048, 512, device=wrong)


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_way_of_a_device_gives_the_same(dtype):
    audio = sound(60_000, channels=2)
    expected, scale = packed_stft(audio, 2048, 512, dtype)
    out = np.zeros_like(expected)
    _transform_on_device(torch.from_numpy(audio), torch.hann_window(2048) / float(scale), 512, torch.device('cpu'), out)
    assert snr_decibels(unpack(expected, scale), unpack(out, scale)) > (70 if dtype == 'float16' else 110)


def test_damage_comes_after_the_segments_before_it(tmp_path):
    whole = write(tmp_path/'a.flac', sound(10 * RATE)).read_bytes()
    (tmp_path/'b.flac').write_bytes(whole[:len(whole) * 3 // 4])
    found = []
    with pytest.raises(FormatError, match='is damaged|is cut off'):
        for start, *_ in audio_segments(tmp_path/'b.flac', STFTConfig(segment_seconds=1)): found.append(start)
    assert found == [float(k) for k in range(len(found))] and 3 <= len(found) < 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', DTYPES)
def test_cuda_gives_the_same_spectrum(dtype):
    audio = sound(60_000, channels=2)
    (here, scale), (there, scale_there) = packed_stft(audio, 2048, 512, dtype), packed_stft(audio, 2048, 512, dtype, device='cuda')
    assert scale == scale_there and here.shape == there.shape and here.dtype == there.dtype
    assert snr_decibels(unpack(here, scale), unpack(there, scale)) > (70 if dtype == 'float16' else 110)


def test_configuration():
    config = STFTConfig(windows=[256, 2048], hop_length=128, channels=2, segment_seconds=0.5)
    assert STFTConfig.from_dict(config.as_dict()) == config and hash(config) and config.windows == (256, 2048)
    fields = stft_fields(sound(config.segment_frames, 2), config)
    assert {name: array.shape for name, array in fields.items()} == {
        'stft_256': config.shape(256, 22050), 'stft_256_scale': (), 'stft_2048': config.shape(2048, 22050), 'stft_2048_scale': ()}
    for wrong in (dict(windows=(2047,)), dict(windows='2048'), dict(hop_length=0), dict(hop_length=2049), dict(segment_seconds=float('nan')),
                  dict(segment_seconds=-1), dict(channels=True), dict(sample_rate=0), dict(dtype='half')):
        with pytest.raises(UsageError, match=next(iter(wrong))): STFTConfig(**wrong)
    for wrong in (True, '1', [1]):
        with pytest.raises(UsageError, match='a number of seconds, or None'): STFTConfig(segment_seconds=wrong)
    for seconds in (np.float32(2), np.int64(2)):
        config = STFTConfig(segment_seconds=seconds)
        assert config == STFTConfig(segment_seconds=2) and type(config.segment_seconds) in (int, float) and json.dumps(config.as_dict())


# Audio files

FORMATS = {'wav': {}, 'float.wav': {'subtype': 'FLOAT'}, '24.wav': {'subtype': 'PCM_24'}, 'aiff': {}, 'au': {}, 'flac': {},
           '24.flac': {'subtype': 'PCM_24'}, 'caf': {}, 'w64': {'format': 'W64'}, 'rf64': {'format': 'RF64'}, 'ogg': {}, 'mp3': {}}


def write(path, audio, rate=RATE, **options):
    "Write float32 (channels, samples), in parts: libsndfile's Vorbis encoder overflows its stack on long ones"
    options = {'format': {'mp3': 'MP3'}.get(path.suffix[1:]), **options}
    with soundfile.SoundFile(path, 'w', rate, len(audio), **{k: v for k, v in options.items() if v}) as file:
        for first in range(0, audio.shape[1], 4096): file.write(audio[:, first:first + 4096].T)
    return path


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('channels', [1, 2])
def test_every_format_reads_as_soundfile_reads_it(tmp_path, name, channels):
    path = write(tmp_path/f'a.{name}', sound(RATE, channels), **FORMATS[name])
    audio, rate = read_audio(path)
    assert rate == RATE and audio.dtype == np.float32 and audio.flags.c_contiguous
    assert np.array_equal(audio, soundfile.read(path, dtype='float32', always_2d=True)[0].T)
    mono, _ = read_audio(path, channels=1)
    np.testing.assert_allclose(mono[0], audio.mean(0), atol=1e-7)
    assert read_audio(path, channels=2)[0].shape == (2, audio.shape[1])
    with AudioReader(path) as reader: assert reader.facts.reader == 'soundfile' and reader.facts.seconds == pytest.approx(1)


@pytest.mark.parametrize('rate', [8000, 16000, 22050, 48000, 96000])
@pytest.mark.parametrize('channels', [1, 2])
def test_blocks_resample_as_the_whole_does(tmp_path, rate, channels):
    audio = sound(3 * BLOCK_FRAMES + 17, channels)
    path = write(tmp_path/'a.wav', audio, subtype='FLOAT')
    resampled, given = read_audio(path, rate)
    expected = soxr.resample(audio.T, RATE, rate, quality='HQ').T
    assert given == rate and abs(resampled.shape[1] - expected.shape[1]) <= 1
    length = min(resampled.shape[1], expected.shape[1])
    np.testing.assert_allclose(resampled[:, :length], expected[:, :length], atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(samples=st.integers(1, 200_000), frames=st.integers(500, 90_000), least=st.integers(1, 3000), rate=st.sampled_from([RATE, 22050]))
def test_segments_are_the_file(tmp_path_factory, samples, frames, least, rate):
    path = write(tmp_path_factory.mktemp('segments')/'a.wav', sound(samples))
    with AudioReader(path, rate) as reader:
        whole = reader.read()
        total = whole.shape[1]
        if total < least:
            with pytest.raises(FormatError, match='too short'): [*reader.segments(frames, least)]
            return
        segments = [*reader.segments(frames, least)]
    assert all(segment.shape == (1, frames) for _, segment, _ in segments)
    assert [start for start, *_ in segments] == [k * frames / rate for k in range(len(segments))]
    assert len(segments) == total // frames + (total % frames >= least) or frames < least
    joined = np.concatenate([segment for _, segment, _ in segments], axis=1) if segments else whole[:, :0]
    length = min(total, joined.shape[1])
    assert sum(samples for *_, samples in segments) == length
    assert np.array_equal(joined[:, :length], whole[:, :length]) and not joined[:, length:].any()


def test_segments_are_new_arrays(tmp_path):
    path = write(tmp_path/'a.wav', sound(RATE))
    with AudioReader(path) as reader: first, second, *_ = [segment for _, segment, _ in reader.segments(5000)]
    assert not np.shares_memory(first, second) and not np.array_equal(first, second)


def test_a_long_file_is_never_whole_in_memory(tmp_path):
    path = write(tmp_path/'long.wav', np.tile(sound(RATE), 300))
    tracemalloc.start()
    count = sum(1 for _ in audio_segments(path, STFTConfig(segment_seconds=1, sample_rate=22050)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 300 and peak < 4e6  # the file has 53 MB as float32


def test_a_segment_holds_at_least_one_window(tmp_path):
    config = STFTConfig(segment_seconds=0.5)
    write(tmp_path/'short.wav', sound(2047))
    write(tmp_path/'enough.wav', sound(2048))
    write(tmp_path/'rest.wav', sound(22050 + 2047))
    with pytest.raises(FormatError, match='too short: 2047 frames at 44100 Hz, at least 2048'): [*audio_segments(tmp_path/'short.wav', config)]
    [(start, segment, samples)] = audio_segments(tmp_path/'enough.wav', config)
    assert start == 0 and segment.shape == (1, 22050)
    assert len([*audio_segments(tmp_path/'rest.wav', config)]) == 1


def bad_files(folder):
    "(name, what the reason says): every kind of file that is not to come into a dataset"
    folder.mkdir()
    rng = np.random.default_rng(0)
    audio = sound(4 * RATE)
    for name in ('wav', 'aiff', 'au', 'flac', 'ogg', 'w64', 'rf64'):
        whole = write(folder/f'whole.{name}', audio, **FORMATS[name]).read_bytes()
        (folder/f'half.{name}').write_bytes(whole[:len(whole) // 2])
        (folder/f'last byte missing.{name}').write_bytes(whole[:-1])
        yield f'half.{name}', 'is cut off|is damaged'
        if name != 'rf64': yield f'last byte missing.{name}', 'is cut off|is damaged'
        for head in (1, 4, 12, 40):
            (folder/f'head {head}.{name}').write_bytes(whole[:head])
            yield f'head {head}.{name}', 'is '
    flac = bytearray((folder/'whole.flac').read_bytes())
    flac[len(flac) // 2:len(flac) // 2 + 500] = bytes(500)
    contents = {'empty.wav': (b'', 'is empty'), 'zeros.wav': (bytes(100_000), 'is no audio'),
                'text.wav': (b'# Readme\n' * 999, 'is no audio'),
                'noise.wav': (rng.bytes(300_000), 'is no audio'), 'noise.flac': (rng.bytes(3000), 'is no audio'),
                'noise': (rng.bytes(9999), 'is no audio'),
                'noise.raw': (rng.bytes(9999), 'is no audio'), 'page.mp3': (b'<html>404 Not Found</html>', 'is no audio'),
                'damaged.flac': (bytes(flac), 'is damaged|is cut off'), 'text.au': (b'some words' * 99, 'is no audio'),
                'text.vox': (b'words', 'is no audio'), 'newline.wav': (b'\n', 'is no audio')}
    for name, (content, reason) in contents.items():
        (folder/name).write_bytes(content)
        yield name, reason
    for name, value in {'nan': np.nan, 'inf': np.inf, 'minus inf': -np.inf, 'huge': 1e30}.items():
        wrong = np.zeros((2, 100_000), np.float32)
        wrong[1, 90_000] = value
        write(folder/f'{name}.wav', wrong, subtype='FLOAT')
        yield f'{name}.wav', 'sample 90000 of channel 1 is '
    write(folder/'no frames.wav', audio[:, :0])
    yield 'no frames.wav', 'holds no audio'
    write(folder/'no frames.aiff', audio[:, :0])
    yield 'no frames.aiff', 'holds no audio'


def test_bad_files_have_a_reason_each(tmp_path):
    said = {}
    for name, reason in bad_files(tmp_path/'bad'):
        path = tmp_path/'bad'/name
        for rate in (None, 22050):
            with pytest.raises(FormatError, match=reason) as caught: read_audio(path, rate, 1)
            assert str(caught.value).startswith(f'{path}: ') and str(caught.value).count(str(path)) == 1, caught.value
        said[name] = str(caught.value)
    assert len(said) > 50


def test_what_is_no_file_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError): read_audio(tmp_path/'nowhere.wav')
    with pytest.raises(IsADirectoryError): read_audio(tmp_path)
    os.mkfifo(tmp_path/'pipe.wav')
    with pytest.raises(FormatError, match='no regular file'): read_audio(tmp_path/'pipe.wav')


def test_wrong_parameters(tmp_path):
    path = write(tmp_path/'a.wav', sound(100, channels=3))
    for wrong in (0, -1, 44100.0, True, '44100'):
        with pytest.raises(UsageError, match='sample_rate'): read_audio(path, sample_rate=wrong)
        with pytest.raises(UsageError, match='channels'): read_audio(path, channels=wrong)
    with pytest.raises(FormatError, match='has 3 channels, which cannot become 2'): read_audio(path, channels=2)
    with AudioReader(path) as reader:
        with pytest.raises(UsageError, match='frames=0'): [*reader.segments(0)]


def with_rate(path, rate):
    "A WAV file whose header states that sample rate"
    content = write(path, sound(32_000)).read_bytes()
    path.write_bytes(content[:24] + rate.to_bytes(4, 'little') + content[28:])
    return path


@pytest.mark.parametrize('rate', [1, 10, 99, 768_001, 2**31 - 1])
def test_a_sample_rate_that_is_none(tmp_path, rate):
    for wanted in (None, RATE, 768_000):
        with pytest.raises(FormatError, match=f'states a sample rate of {rate} Hz; 100 to 768000 Hz are read'): AudioReader(with_rate(tmp_path/'a.wav', rate), wanted)


def test_sample_rates_that_are_too_far_apart(tmp_path):
    path = with_rate(tmp_path/'a.wav', 100)
    assert read_audio(path)[1] == 100 and read_audio(path, 100)[0].shape == (1, 32_000)
    assert read_audio(path, 12_800, 1)[0].shape == (1, 32_000 * 128)
    for rate in (RATE, 768_000):
        with pytest.raises(FormatError, match=f'100 Hz, which is too far from {rate} Hz'): read_audio(path, rate)


def test_trouble_of_the_system_is_not_damage(tmp_path, monkeypatch):
    "What libsndfile reports as an error of the system, as a network file system that is away gives it"
    path = write(tmp_path/'a.wav', sound(RATE))
    def fails(*_, **__): raise soundfile.LibsndfileError(2)
    with AudioReader(path) as reader:
        monkeypatch.setattr(soundfile.SoundFile, 'read', fails)
        with pytest.raises(OSError, match='a.wav') as caught: reader.read()
    assert caught.value.errno == errno.EIO
    monkeypatch.setattr(soundfile, 'SoundFile', fails)
    with pytest.raises(OSError, match='a.wav'): AudioReader(path)


@pytest.mark.parametrize('size', [0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFFFF - 36])
def test_a_wav_from_a_pipe_is_read(tmp_path, size):
    content = bytearray(write(tmp_path/'a.wav', sound(RATE)).read_bytes())
    content[40:44] = size.to_bytes(4, 'little')
    (tmp_path/'pipe.wav').write_bytes(content)
    assert np.array_equal(read_audio(tmp_path/'pipe.wav')[0], read_audio(tmp_path/'a.wav')[0])


@pytest.mark.parametrize('name', ['flac', 'ogg'])
def test_pedalboard_reads_what_soundfile_refuses_and_that_is_said(tmp_path, name):
    whole = write(tmp_path/f'a.{name}', sound(RATE), **FORMATS[name])
    (tmp_path/f'b.{name}').write_bytes(b'tag' * 99 + whole.read_bytes())
    with AudioReader(tmp_path/f'b.{name}', channels=1) as reader:
        assert reader.facts.reader == 'pedalboard' and 'ormat' in reader.facts.refused
        np.testing.assert_allclose(reader.read(), read_audio(whole)[0], atol=1e-3)
        assert np.array_equal(np.concatenate([segment for _, segment, _ in reader.segments(4410)], axis=1), reader.read())


@pytest.mark.parametrize('name', ['a name with spaces.wav', 'Übung – 音.wav', "quote'\".wav", '-.wav'])
def test_names(tmp_path, name):
    audio, _ = read_audio(write(tmp_path/name, sound(5000)))
    assert audio.shape == (1, 5000)


def test_files_are_closed(tmp_path):
    path = write(tmp_path/'a.wav', sound(RATE))
    (tmp_path/'half.wav').write_bytes(path.read_bytes()[:50_000])
    (tmp_path/'b.flac').write_bytes(b'tag' + write(tmp_path/'a.flac', sound(RATE)).read_bytes())
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(20):
        read_audio(path)
        read_audio(tmp_path/'b.flac')
        next(audio_segments(path, STFTConfig(segment_seconds=0.1)))
        with pytest.raises(FormatError): read_audio(tmp_path/'half.wav')
        with pytest.raises(FormatError): read_audio(write(tmp_path/'c.wav', sound(100, channels=3)), channels=2)
    assert len(os.listdir('/proc/self/fd')) <= before + 1


def test_importing_is_light():
    code = 'import sys, datatools.stft.transform; print(*sorted({"pedalboard", "librosa", "h5py", "matplotlib"} & {*sys.modules}))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''


# Real audio

def test_real_audio(shared_data):
    files = sorted((shared_data/'audio').rglob('*.ogg')) + sorted((shared_data/'audio').rglob('*.wav'))[::30]
    assert len(files) > 15
    config = STFTConfig(segment_seconds=3)
    for path in files:
        with AudioReader(path) as reader: assert reader.facts.reader == 'soundfile' and not reader.facts.refused
        for start, audio, _ in audio_segments(path, config):
            array, scale = packed_stft(audio, 2048, 512)
            assert array.shape == config.shape(2048, config.segment_frames)
            restored = istft(unpack(array, scale), 512, audio.shape[1]).numpy()
            assert not audio.any() or snr_decibels(audio, restored) > 76, (path, start)
            if start > 12: break
