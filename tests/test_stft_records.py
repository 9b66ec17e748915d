"Records: what goes in comes out, and no damaged or hostile bytes give anything but a FormatError"

import json
import struct

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from datatools.core import FormatError, UsageError
from datatools.stft import records
from datatools.stft.records import HEAD, MAGIC, Schema, decode_record, encode_record, record_head

DTYPES = st.sampled_from('? i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16 >f4 >i8'.split()).map(np.dtype)
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
NAMES = st.text(st.characters(categories=['L', 'N', 'P']), min_size=1, max_size=20)
TEXT = st.text(st.characters(exclude_categories=['Cs']))
METADATA = st.dictionaries(TEXT, st.recursive(st.none() | st.booleans() | st.integers() | TEXT | st.floats(allow_nan=False, allow_infinity=False),
                                              lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=5))


def an_item():
    fields = dict(stft=np.arange(72, dtype=np.float16).reshape(1, 9, 4, 2), scale=np.float32(0.5), audio=np.zeros((2, 50), np.float32))
    return bytes(encode_record(3, fields, dict(source='ä.wav', start_seconds=0.5)))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**63 - 1), st.dictionaries(NAMES, ARRAYS, max_size=5), METADATA)
def test_round_trip(index, fields, metadata):
    content = encode_record(index, fields, metadata)
    for buffer in (content, bytes(content), memoryview(content), np.frombuffer(content, np.uint8)):
        record = decode_record(buffer, verify=True)
        assert record.index == index and record.metadata == metadata and list(record.fields) == list(fields)
        for name, array in fields.items():
            found = record.fields[name]
            assert found.shape == array.shape and found.dtype == array.dtype.newbyteorder('<') and not found.flags.writeable
            assert found.astype(array.dtype).tobytes() == array.tobytes()
    assert encode_record(index, fields, metadata) == content
    schema = Schema.of(fields)
    assert schema == Schema.of_record(content) and schema.hash == record_head(content).schema_hash and schema.matches(content)
    for name, (offset, _, _) in schema.places.items():
        assert offset % 64 == 48
        assert schema.view(content, name).tobytes() == record.fields[name].tobytes()


def test_arrays_of_any_layout():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for other in (array.transpose(2, 0, 1), array[:, ::2], array[::-1], np.asfortranarray(array), array.astype('>f4')):
        np.testing.assert_array_equal(decode_record(encode_record(0, dict(x=other))).fields['x'], other)
    assert decode_record(encode_record(0, {})).fields == {}


@pytest.mark.parametrize('value', [np.array([{}]), np.array(['a']), np.array([b'a']), np.zeros(1, 'M8[s]'), np.zeros(1, [('a', 'f4')]),
                                   'text', None, np.zeros(1, np.longdouble)], ids=str)
def test_other_dtypes_are_refused(value):
    with pytest.raises(UsageError, match='boolean, integer, float or complex'): encode_record(0, dict(x=value))


def test_every_cut_and_every_flipped_byte_is_found():
    content = an_item()
    for length in range(len(content)):
        with pytest.raises(FormatError): decode_record(content[:length])
    for extra in (b'\0', content):
        with pytest.raises(FormatError): decode_record(content + extra)
    for position in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= flip
            with pytest.raises(FormatError): decode_record(damaged, verify=True)


def test_damage_of_the_payload_is_found_by_verify_alone():
    damaged = bytearray(an_item())
    damaged[Schema.of_record(damaged).place('audio')[0]] ^= 1
    assert decode_record(damaged).fields['audio'][0, 0] != 0
    with pytest.raises(FormatError, match='checksum of the arrays of item 3'): decode_record(damaged, verify=True)


def forged(schema=None, payload_end=None, metadata=b'{}', schema_hash=None, **head):
    "A record with checksums that are right, whatever else is wrong"
    schema = b'[["x","<f4",[4]]]' if schema is None else schema
    digest = records.hashlib.blake2b(schema, digest_size=8).digest()
    start = HEAD.size + len(schema)
    end = records._aligned(start) + 16 if payload_end is None else payload_end
    payload = bytes(max(0, min(end, 1 << 16) - start))
    values = dict(magic=MAGIC, version=1, reserved=0, schema_bytes=len(schema), hash=int.from_bytes(digest, 'little') if schema_hash is None else schema_hash,
                  index=0, end=end, metadata_bytes=len(metadata), payload=records._checksum(payload), header=0) | head
    content = bytearray(HEAD.pack(*values.values()) + schema + payload + metadata)
    struct.pack_into('<I', content, 48, records._checksum(bytes(content[:48]), schema, metadata))
    return bytes(content)


def test_forged_record_is_otherwise_valid():
    np.testing.assert_array_equal(decode_record(forged(), verify=True).fields['x'], np.zeros(4, np.float32))


@pytest.mark.parametrize('forgery', [
    dict(schema=b'[["x","|O",[4]]]'), dict(schema=b'[["x","<U4",[4]]]'), dict(schema=b'[["x","|S4",[4]]]'), dict(schema=b'[["x","<M8[s]",[4]]]'),
    dict(schema=b'[["x","<f4",[-4]]]'), dict(schema=b'[["x","<f4",[5]]]'), dict(schema=b'[["x","<f4",[3]]]'), dict(schema=b'[["x","<f4",[4611686018427387905]]]'),
    dict(schema=b'[["x","<f4",[1099511627776,1099511627776]]]'), dict(schema=b'[["x","<f4",[0,1099511627776,1099511627776]]]', payload_end=112),
    dict(schema=b'[["x","<f4",[' + b'1,' * 32 + b'4]]]'), dict(schema=b'[["x","<f4",[4.0]]]'), dict(schema=b'[["x","<f4",[true]]]'),
    dict(schema=b'[["x","<f4"]]'), dict(schema=b'[["","<f4",[4]]]'), dict(schema=b'[[1,"<f4",[4]]]'), dict(schema=b'["x"]'), dict(schema=b'null'),
    dict(schema=b'[["x","<f4",[4]],["x","<f4",[0]]]'), dict(schema=b'[["x", "<f4", [4]]]'), dict(schema=b'[["x","<f4",[Infinity]]]'),
    dict(schema=b'[' * 50_000), dict(schema=b'[["x","<f4",[' + b'9' * 5000 + b']]]'), dict(schema=b'\xff\xfe'), dict(schema=b''),
    dict(schema=json.dumps([[f'x{i}', '<f4', []] for i in range(1025)], separators=(',', ':')).encode()),
    dict(schema_hash=1), dict(payload_end=64), dict(payload_end=1 << 62), dict(end=1 << 63), dict(end=2**64 - 1), dict(end=0), dict(schema_bytes=2**32 - 1),
    dict(schema_bytes=0), dict(metadata_bytes=2**32 - 1), dict(metadata_bytes=0), dict(reserved=1), dict(version=2), dict(version=0), dict(magic=b'DTRECORE'),
    dict(metadata=b'[]'), dict(metadata=b'null'), dict(metadata=b'{"a":NaN}'), dict(metadata=b'{'), dict(metadata=b'\xff'), dict(metadata=b''),
    dict(metadata=b'{"a":' * 50_000), dict(metadata=b'{"a":' + b'9' * 5000 + b'}'),
], ids=lambda forgery: str(forgery)[:60])
def test_forged_records_are_refused(forgery):
    with pytest.raises(FormatError): decode_record(forged(**forgery), verify=True)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused(content, with_magic):
    if with_magic: content = MAGIC + b'\1\0\0\0' + content
    with pytest.raises(FormatError): decode_record(content)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_mutated_schemas_give_a_format_error_or_an_array_inside_the_record(data):
    schema = bytearray(b'[["stft_2048","<f2",[1,3,2,2]],["scale","<f4",[]]]')
    for _ in range(data.draw(st.integers(1, 4))): schema[data.draw(st.integers(0, len(schema) - 1))] = data.draw(st.sampled_from(b'0123456789,[]"<>fiuc?|O-e.'))
    content = forged(bytes(schema), payload_end=data.draw(st.integers(64, 600)))
    try: record = decode_record(content)
    except FormatError: return
    assert sum(array.nbytes for array in record.fields.values()) <= len(content)


def test_a_known_schema_refuses_records_that_end_early():
    content = an_item()
    schema = Schema.of_record(content)
    for length in (0, 10, 64, schema.end - 1):
        with pytest.raises(FormatError): schema.view(content[:length], 'stft')
        assert not schema.matches(content[:length])


def test_nothing_is_unpickled():
    "In no module of the tool: a store from a stranger runs no code"
    modules = [*Path(records.__file__).parent.glob('*.py')]
    assert len(modules) > 8
    for module in modules:
        text = module.read_text()
        for word in ('pickle.load', 'allow_pickle', 'import pickle', 'torch.load', 'np.load', 'Unpickler', 'marshal', 'eval(', 'exec('): assert word not in text, (module, word)


def test_no_record_is_larger_than_what_lmdb_can_hold():
    many = np.empty(1 << 32, np.uint8)  # takes no memory as long as nobody looks at it
    with pytest.raises(UsageError, match='at most 4294967295 bytes.*Make several items'): encode_record(0, {'x': many})
    with pytest.raises(UsageError, match='metadata=.*bytes beside these fields'): encode_record(0, {'x': many[:(1 << 32) - 200]}, {'text': 'x' * 200})
