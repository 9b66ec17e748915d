"""Mutants of real MIDI files against `read_drums`: no crash, no hang, no half-read file.

    python -m benchmarks.fuzz_midi --mutants 30000

Each mutant goes to `read_drums` in a process of its own kind, which a parent watches: a process that dies or
stands still is named by its mutant, and the run goes on behind it. What `read_drums` accepts must be what
`reference_read` finds, a slow reader written from the Standard MIDI Files 1.0 specification (RP-001) alone.
"""
import argparse
import json
import queue
import resource
import subprocess
import sys
import threading
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Unreadable(Exception):
    "The bytes break the specification"


class Reading(NamedTuple):
    "What `reference_read` finds"
    onsets: list           # (tick, key, velocity), sorted
    ticks_per_beat: int
    signatures: list       # (tick, numerator, denominator), by tick, those of one tick in file order
    tempos: list           # (tick, microseconds per beat), likewise
    spans: list            # (begin, end) of every event in the file, its delta time included
    chunks: list           # offset of every MTrk chunk


def need(condition, reason):
    if not condition: raise Unreadable(reason)


def reference_number(data, at, end):
    "A variable-length quantity of 1 to 4 bytes: (value, next position)"
    value = 0
    for n in range(4):
        need(at + n < end, 'a number is cut short')
        value = value * 128 + data[at + n] % 128
        if data[at + n] < 128: return value, at + n + 1
    raise Unreadable('a number has more than four bytes')


def reference_track(data, at, end, reading):
    """One MTrk chunk. The specification lets a meta or system exclusive event end running status; files that go on
    with it are common, and all readers agree on what they mean, so they are accepted here."""
    tick, status = 0, None
    while at < end:
        begin = at
        delta, at = reference_number(data, at, end)
        tick += delta
        need(tick < 2**31, 'a time beyond 31 bits')
        need(at < end, 'a delta time without an event')
        first = data[at]
        if first in (0xF0, 0xF7, 0xFF):
            kind, at = (data[at + 1] if at + 1 < end else None, at + 2) if first == 0xFF else (None, at + 1)
            length, at = reference_number(data, at, end)
            need(at + length <= end, 'an event goes beyond its chunk')
            content, at = data[at:at + length], at + length
            reading.spans.append((begin, at))
            if kind == 0x2F:
                need(length == 0, 'end of track with content')
                need(at == end, 'events after the end of track')
                return
            if kind == 0x51:
                need(length == 3 and any(content), 'a tempo of the wrong size, or zero')
                reading.tempos.append((tick, int.from_bytes(content, 'big')))
            if kind == 0x58:
                need(length >= 2 and content[0] and content[1] <= 6, 'a time signature that makes no sense')
                reading.signatures.append((tick, content[0], 2 ** content[1]))
            continue
        need(first < 0xF0, 'a system common or real time message')
        if first >= 0x80: status, at = first, at + 1
        need(status is not None, 'a data byte before any status')
        size = 1 if status >> 4 in (0xC, 0xD) else 2
        message, at = data[at:at + size], at + size
        need(at <= end, 'a message goes beyond its chunk')
        need(max(message) < 128, 'a status byte among the data')
        reading.spans.append((begin, at))
        if status == 0x99 and message[1] > 0: reading.onsets.append((tick, message[0], message[1]))
    raise Unreadable('no end of track')


def reference_read(data):
    "All drum onsets of a MIDI file of format 0 or 1, or `Unreadable`"
    need(data[:4] == b'MThd', 'no header')
    need(len(data) >= 14, 'the header is cut short')
    length, form, tracks, division = (int.from_bytes(data[a:b], 'big') for a, b in ((4, 8), (8, 10), (10, 12), (12, 14)))
    need(length >= 6, 'a short header')
    need(form in (0, 1), 'no common time line')
    need(tracks > 0, 'no tracks')
    need(0 < division < 0x8000, 'no ticks per beat')
    reading, at = Reading([], division, [], [], [], []), 8 + length
    while len(reading.chunks) < tracks:
        need(at + 8 <= len(data), 'a track is missing')
        end = at + 8 + int.from_bytes(data[at + 4:at + 8], 'big')
        need(end <= len(data), 'a chunk goes beyond the file')
        if data[at:at + 4] == b'MTrk':
            reading.chunks.append(at)
            reference_track(data, at + 8, end, reading)
        at = end
    need(data[at:at + 4] != b'MTrk' or len(data) < at + 8, 'a track that the header does not announce')
    reading.onsets.sort()
    for changes in (reading.signatures, reading.tempos): changes.sort(key=lambda change: change[0])
    return reading


def differences(reading, part):
    "How a `DrumPart` differs from a `Reading`, in words"
    onsets = sorted(zip(part.tick.tolist(), part.pitch.tolist(), part.velocity.tolist()))
    if onsets != reading.onsets: yield f'{len(onsets)} onsets, {len(reading.onsets)} expected; {len(set(onsets) ^ set(reading.onsets))} differ'
    if part.ticks_per_beat != reading.ticks_per_beat: yield f'{part.ticks_per_beat} ticks per beat, {reading.ticks_per_beat} expected'
    found, stated = [tuple(row) for row in part.time_signatures.tolist()], reading.signatures
    if found != sorted(found, key=lambda row: row[0]): yield f'time signatures out of order: {found[:4]}'
    for tick in {tick for tick, _, _ in onsets}:  # the one in force at each onset
        mine, theirs = (bisect_right(rows, tick, key=lambda row: row[0]) for rows in (found, stated))
        if (found[mine - 1][1:] if mine else None) != (stated[theirs - 1][1:] if theirs else None):
            yield f'time signature at tick {tick}: {found[mine - 1] if mine else None}, {stated[theirs - 1] if theirs else None} expected'
            break
    tempos = [60e6 / tempo for _, tempo in reading.tempos] or [120.0]
    if not any(abs(part.tempo / tempo - 1) < 1e-6 for tempo in tempos): yield f'tempo {part.tempo}, one of {tempos[:4]} expected'


def verdict(data):
    "(outcome, whether it is a failure) of `read_drums` on these bytes"
    from datatools.groove.midi import MidiFault, read_drums
    try: expected = reference_read(data)
    except Unreadable as reason: expected = str(reason)
    before = bytes(bytearray(data))
    try: part = read_drums(data)
    except MidiFault as error:
        name = error.fault.name
        if isinstance(expected, Reading) and expected.onsets: return f'REFUSED as {name}, but the reference reads it: {error}', True
        return name, isinstance(expected, Reading) != (name == 'no_drums')
    except Exception as error: return f'RAISED {type(error).__name__}: {error}', True
    if data != before: return 'CHANGED the bytes it was given', True
    if not isinstance(expected, Reading): return f'HALF-READ: {expected}', True
    found = '; '.join(differences(expected, part))
    return (f'WRONG: {found}', True) if found else ('read', False)


INTERESTING = bytes([0, 1, 0x40, 0x7F, 0x80, 0x81, 0x89, 0x90, 0x99, 0xC9, 0xF0, 0xF1, 0xF7, 0xF8, 0xFF, 0x2F, 0x51, 0x58])
EVENTS = [bytes.fromhex(text.replace(' ', '')) for text in (
    '00 99 24 40', '10 99 26 00', '81 40 99 2a 7f', '00 89 24 40', '00 24 40', '00 c9 05', '05 d9 10', '00 99 24 80', '00 b9 7b 00', '00 e9 00 40',
    '00 ff 51 03 07 a1 20', '00 ff 51 03 00 00 00', '83 60 ff 51 03 03 d0 90', '00 ff 58 04 03 02 18 08', '00 ff 58 04 07 03 18 08', '87 00 ff 58 02 05 02',
    '00 ff 58 04 00 02 18 08', '00 ff 58 04 04 ff 18 08', '00 ff 03 04 e9 ff 80 41', '00 ff 2f 00', '00 ff 21 01 00', '00 ff 20 01 09', '00 ff 99 01 00',
    '00 f0 05 7e 7f 09 01 f7', '00 f0 03 43 12 00', '00 f7 02 f3 01', '00 f7 00', '00 f8', '00 f1 00', '00 ff 7f 00', '00 ff 59 02 00 00', '00 ff 59 02 7f 05',
    '00 ff 54 05 60 00 03 00 00', '8f ff ff 7f 99 24 40', 'ff ff ff 7f 99 24 40', '00 f0 7f 01 02', '00 99 24 40 30 24 00', '00 90 3c 40', '20 80 3c 00', '00 ff 00 02 00 01')]


def number(value):
    "A variable-length quantity"
    out = [value & 127]
    while value := value >> 7: out.append(value & 127 | 128)
    return bytes(reversed(out))


def repaired(data, at, grown):
    "The file with the length of the chunk that holds offset `at` corrected by `grown` bytes"
    chunk = data.rfind(b'MTrk', 0, at)
    if chunk < 0 or chunk + 8 > len(data): return data
    length = int.from_bytes(data[chunk + 4:chunk + 8], 'big') + grown
    return data[:chunk + 4] + max(0, min(length, 2**32 - 1)).to_bytes(4, 'big') + data[chunk + 8:]


def mutate_bytes(data, other, rng):
    "One blind mutation"
    at, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 9))
    kind = int(rng.integers(9))
    if kind == 0 and at < len(data): return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1:]
    if kind == 1: return data[:at] + bytes([INTERESTING[int(rng.integers(len(INTERESTING)))]]) + data[at + 1:]
    if kind == 2: return data[:at] + data[at + size:]
    if kind == 3: return data[:at] + rng.bytes(size) + data[at:]
    if kind == 4: return data[:at]
    if kind == 5: return data[:at] + other[int(rng.integers(len(other) + 1)):]
    if kind == 6:  # a header field: length, format, tracks or division
        field, width = [(4, 4), (8, 2), (10, 2), (12, 2)][int(rng.integers(4))]
        value = int(rng.choice([0, 1, 2, 3, 6, 7, 96, 480, 0x7FFF, 0x8000, 0xE728, 0xFFFF]))
        return data[:field] + value.to_bytes(width, 'big') + data[field + width:]
    chunk = data.find(b'MTrk', at) if data.find(b'MTrk', at) >= 0 else data.find(b'MTrk')
    if chunk < 0: return data[:at] + b'MTrk' + data[at:]
    if kind == 7:  # a chunk length
        length = int.from_bytes(data[chunk + 4:chunk + 8], 'big')
        value = int(rng.choice([0, 1, length - 1, length + 1, length - 4, length + 8, length // 2, 2**31 - 1, 2**31, 2**32 - 1])) % 2**32
        return data[:chunk + 4] + value.to_bytes(4, 'big') + data[chunk + 8:]
    name = [b'Junk', b'XFIH', b'MTrK', b'MThd'][int(rng.integers(4))]
    return data[:chunk] + name + (data[chunk + 4:] if rng.random() < 0.5 else size.to_bytes(4, 'big') + bytes(size) + data[chunk:])


def mutate_events(data, other, rng):
    "One mutation at an event's boundary, chunk length kept right: these get past the outer checks"
    try: spans = reference_read(data).spans
    except Unreadable: return mutate_bytes(data, other, rng)
    begin, end = spans[int(rng.integers(len(spans)))]
    kind = int(rng.integers(6))
    if kind <= 1: new = EVENTS[int(rng.integers(len(EVENTS)))] + data[begin:end]
    elif kind == 2: new = b''
    elif kind == 3:  # another delta time, sometimes of too many bytes
        delta = number(int(rng.choice([0, 1, 127, 128, 479, 480, 16383, 16384, 2**21 - 1, 2**21, 2**28 - 1, 2**28])))
        new = (b'\x80' * int(rng.integers(3)) if rng.random() < 0.5 else b'') + delta + data[reference_number(data, begin, end)[1]:end]
    elif kind == 4: new = data[begin:end] * 2
    else:
        at = reference_number(data, begin, end)[1]
        new = data[begin:at] + data[at + 1:end] if 0x80 <= data[at] < 0xF0 else data[begin:end - 1]  # drop a status byte, or the last byte
    return repaired(data[:begin] + new + data[end:], begin, len(new) - (end - begin))


def mutant(seed, index, corpus):
    "Mutant number `index`: the same bytes on every machine"
    from datatools.core import rng_for
    rng = rng_for(seed, 'midi mutant', index)
    data, other = (corpus[int(rng.integers(len(corpus)))] for _ in range(2))
    for _ in range(int(rng.integers(1, 5))): data = (mutate_events if rng.random() < 0.6 else mutate_bytes)(data, other, rng)
    return data


def read_corpus(folder, most_bytes):
    "Real performances and odd files of `folder` up to a size, or synthetic loops where it is missing"
    from datatools.testing import synthetic_drum_midi
    loops = [synthetic_drum_midi(seed, 2, style) for seed in range(3) for style in ('rock', 'funk', 'jazz')]
    if folder is None or not Path(folder).is_dir(): return loops
    real = [path.read_bytes() for path in sorted(Path(folder).glob('groove_midi/**/*.mid')) if path.stat().st_size <= most_bytes]
    odd = [path.read_bytes() for path in sorted(Path(folder).glob('midi_odd/**/*.mid')) if 0 < path.stat().st_size <= most_bytes]
    return loops + real[:200] + odd


def work(arguments):
    "The watched process: one line before and one after each mutant"
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a mutant that asks for a huge buffer fails loudly
    corpus = read_corpus(arguments.data, arguments.most_bytes)
    verdict(corpus[0])
    for index in range(arguments.first, arguments.mutants):
        print(f'{index} begin', flush=True)
        data = mutant(arguments.seed, index, corpus)
        outcome, failed = verdict(data)
        if failed and arguments.save:
            Path(arguments.save).mkdir(parents=True, exist_ok=True)
            (Path(arguments.save)/f'mutant-{arguments.seed}-{index}.mid').write_bytes(data)
        print(json.dumps([index, outcome, failed]), flush=True)


def watch(arguments):
    "Run the watched process to the end: (Counter of outcomes, failures as (mutant, outcome))"
    outcomes, failures, first = Counter(), [], arguments.first
    while first < arguments.mutants and len(failures) < 100:
        command = [sys.executable, '-m', 'benchmarks.fuzz_midi', '--work', '--first', first, '--mutants', arguments.mutants, '--seed', arguments.seed,
            '--most-bytes', arguments.most_bytes, *(['--data', arguments.data] if arguments.data else []), *(['--save', arguments.save] if arguments.save else [])]
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        lines = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        current, patience = None, 300.0  # the first line waits for compilation
        while True:
            try: line = lines.get(timeout=patience)
            except queue.Empty:
                process.kill()
                line = 'hang'
            if line in ('', 'hang'): break
            patience = arguments.patience
            if line.endswith('begin\n'): current = int(line.split()[0])
            else:
                index, outcome, failed = json.loads(line)
                outcomes[outcome.split(':')[0]] += 1
                if failed: failures.append((index, outcome))
                first, current = index + 1, None
        code = process.wait()
        if line == '' and code == 0: break
        if current is None: raise SystemExit(f'the watched process ended with {code} before mutant {first}')
        outcome = 'HANG' if line == 'hang' else f'CRASH {code}'
        outcomes[outcome] += 1
        failures.append((current, outcome))
        first = current + 1
    return outcomes, failures


def _pump(stream, lines):
    "Lines of a stream into a queue, then an empty one"
    for line in stream: lines.put(line)
    lines.put('')


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--mutants', type=int, default=30_000, help='number of mutants')
    parser.add_argument('--first', type=int, default=0, help='number of the first mutant')
    parser.add_argument('--seed', type=int, default=0, help='decides all mutants')
    parser.add_argument('--data', default=str(ROOT.parent/'shared/data'), help='folder with groove_midi and midi_odd; synthetic loops if missing')
    parser.add_argument('--most-bytes', type=int, default=4000, help='files above this size are left out')
    parser.add_argument('--patience', type=float, default=20.0, help='seconds after which a mutant hangs')
    parser.add_argument('--save', default=str(ROOT/'benchmarks/results/fuzz_midi'), help='where failing mutants are kept')
    parser.add_argument('--work', action='store_true', help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work: return work(arguments)
    outcomes, failures = watch(arguments)
    for outcome, number_of in outcomes.most_common(): print(f'{number_of:8,}  {outcome}')
    print(f'{sum(outcomes.values()):8,}  mutants, {len(failures)} failures')
    for index, outcome in failures[:20]: print(f'mutant {index} of seed {arguments.seed}: {outcome}')
    sys.exit(1 if failures else 0)


if __name__ == '__main__': main()
