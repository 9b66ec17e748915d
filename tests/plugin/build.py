"""Build the test instrument as a VST3 plugin: `python tests/plugin/build.py [FOLDER] [DEFINE ...]`.

Needs g++ and Debian's `dpf-source` (the DISTRHO Plugin Framework, ISC licence, used at build time only). A define
makes a variant: MONO, TWO_PLUGINS, UNPATCHED (keeps the framework's 2,080 MIDI parameters), AT_LOAD=1 (the Misbehave
choice of that number strikes on loading), LOAD_SECONDS=2 (slow to load), CHATTY (the framework talks on stderr). What
is built once is found again, until a source changes.
"""
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / 'TestSynth.cpp', HERE / 'DistrhoPluginInfo.h']
FRAMEWORK = Path('/usr/share/dpf')
MACHINE = f'{platform.machine()}-linux'
FLAGS = ['-std=gnu++17', '-O2', '-fPIC', '-shared', '-fvisibility=hidden', '-DDISTRHO_PLUGIN_TARGET_VST3', '-DNDEBUG', '-w']
# 2,080 MIDI controllers posing as parameters are cut out of a copy: a host takes 10 s to read them all.
PATCHES = {
    'src/DistrhoPluginVST.hpp': [('kVst3InternalParameterMidiCC_start + 130*16', 'kVst3InternalParameterMidiCC_start')],
    'src/DistrhoPluginVST3.cpp': [('        *id = kVst3InternalParameterMidiCC_start + channel * 130 + cc;\n        return V3_TRUE;',
                               '        return V3_FALSE;')]}
# What the framework says on stderr (it finds fault with the host whenever it is loaded) is cut out, too.
QUIET = {'DistrhoUtils.hpp': [(f'void {name}(const char* const fmt, ...) noexcept\n{{', f'void {name}(const char* const fmt, ...) noexcept\n{{ return;')
                              for name in ('d_stderr', 'd_stderr2')]}


class CannotBuild(Exception):
    "What is missing and how to install it, in one line."


def build(*defines: str, folder: Path = HERE / 'build') -> Path:
    "The path of a variant's `.vst3` bundle below `folder`, built if it is not there yet."
    missing = [package for package, found in {'g++': shutil.which('g++'), 'dpf-source': (FRAMEWORK / 'distrho').is_dir()}.items() if not found]
    if missing: raise CannotBuild(f'the test instrument needs {" and ".join(missing)}: apt-get install -y --no-install-recommends {" ".join(missing)}')
    folder, name = Path(folder), '-'.join(['TestSynth', *(define.replace('=', '') for define in defines)])
    bundle = folder / f'{_key(defines)}' / f'{name}.vst3'
    if bundle.is_dir(): return bundle
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.building-', dir=folder) as work:
        _compile(Path(work), name, defines)
        try: os.rename(Path(work) / 'done', bundle.parent)
        except OSError:
            if not bundle.is_dir(): raise  # else another process was faster
    return bundle


def _key(defines) -> str:
    "A hash of all that decides what is built."
    framework = [path for path in (FRAMEWORK / 'distrho').rglob('*') if path.is_file()]
    parts = [' '.join(FLAGS), MACHINE, repr((PATCHES, QUIET)), *defines, *(path.read_text() for path in SOURCES)]
    parts += [f'{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}' for path in sorted(framework)]
    return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:12]


def _compile(work: Path, name: str, defines) -> None:
    "Copy and patch the framework, compile, and leave `done/NAME.vst3` in `work`."
    distrho = Path(shutil.copytree(FRAMEWORK / 'distrho', work / 'distrho'))
    patches = {**({} if 'UNPATCHED' in defines else PATCHES), **({} if 'CHATTY' in defines else QUIET)}
    for file, changes in patches.items():
        text = (distrho / file).read_text()
        for old, new in changes:
            if text.count(old) != 1: raise CannotBuild(f'this version of dpf-source is not known: {file} lacks {old!r}')
            text = text.replace(old, new)
        (distrho / file).write_text(text)
    library = work / 'done' / f'{name}.vst3' / 'Contents' / MACHINE / f'{name}.so'
    library.parent.mkdir(parents=True)
    command = ['g++', *FLAGS, f'-DNAME="{name}"', *(f'-D{define}' for define in defines), f'-I{HERE}', f'-I{distrho}', HERE / 'TestSynth.cpp',
               f'-Wl,--version-script={FRAMEWORK}/utils/symbols/vst3.version', '-Wl,-Bsymbolic', '-o', library]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode: raise CannotBuild(f'g++ failed: {result.stderr[-2000:]}')


if __name__ == '__main__':
    folders = [argument for argument in sys.argv[1:] if os.sep in argument or argument.startswith('.')]
    try: print(build(*(argument for argument in sys.argv[1:] if argument not in folders), **({'folder': folders[0]} if folders else {})))
    except CannotBuild as problem: sys.exit(str(problem))
