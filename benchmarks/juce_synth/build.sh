#!/bin/sh
# Build JuceSynth.vst3 into the folder $1 (benchmarks/results/juce by default) with Debian's JUCE 7, in some two minutes
# the first time. JUCE's sources are fetched with `apt-get download` and unpacked there: nothing is installed.
# JUCE adds a parameter for each of 2,080 MIDI controllers and a bypass: hosts see 2,853 in all.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/../results/juce}
mkdir -p "$out/objects"
out=$(cd "$out" && pwd)

missing=
command -v g++ >/dev/null || missing="$missing g++"
for header in ft2build.h:libfreetype-dev png.h:libpng-dev jpeglib.h:libjpeg-dev zlib.h:zlib1g-dev X11/Xlib.h:libx11-dev; do
    [ -e "/usr/include/${header%%:*}" ] || [ -e "/usr/include/freetype2/${header%%:*}" ] || missing="$missing ${header##*:}"
done
[ -z "$missing" ] || { echo "the JUCE synth needs$missing: apt-get install -y --no-install-recommends$missing" >&2; exit 1; }

modules=$out/juce/usr/share/juce/modules
if [ ! -d "$modules" ]; then
    (cd "$out" && apt-get download -q juce-modules-source juce-modules-source-data >/dev/null 2>&1) ||
        { echo "apt-get cannot download juce-modules-source: Debian 12 or Ubuntu with 'universe' is needed" >&2; exit 1; }
    for package in "$out"/juce-modules-source*.deb; do dpkg -x "$package" "$out/juce"; done
fi

code() { printf '0x%s' "$(printf %s "$1" | od -An -tx1 | tr -d ' \n')"; }
cat > "$out/settings.h" <<SETTINGS
#define JucePlugin_Name "JuceSynth"
#define JucePlugin_Desc "Benchmark synth"
#define JucePlugin_Manufacturer "datatools"
#define JucePlugin_ManufacturerWebsite ""
#define JucePlugin_ManufacturerEmail ""
#define JucePlugin_ManufacturerCode $(code DtTl)
#define JucePlugin_PluginCode $(code DtJs)
#define JucePlugin_Version 1.0.0
#define JucePlugin_VersionCode 0x10000
#define JucePlugin_VersionString "1.0.0"
#define JucePlugin_IsSynth 1
#define JucePlugin_WantsMidiInput 1
#define JucePlugin_ProducesMidiOutput 0
#define JucePlugin_IsMidiEffect 0
#define JucePlugin_EditorRequiresKeyboardFocus 0
#define JucePlugin_Vst3Category "Instrument|Synth"
#define JucePlugin_VSTNumMidiInputs 16
#define JucePlugin_VSTNumMidiOutputs 0
#define JucePlugin_Build_VST3 1
#define JucePlugin_Build_VST 0
#define JucePlugin_Build_AU 0
#define JucePlugin_Build_AUv3 0
#define JucePlugin_Build_AAX 0
#define JucePlugin_Build_LV2 0
#define JucePlugin_Build_Standalone 0
#define JucePlugin_Build_Unity 0
SETTINGS
flags="-std=c++17 -O2 -fPIC -fvisibility=hidden -ffunction-sections -fdata-sections -w -DNDEBUG=1 -DLINUX=1
 -DJUCE_GLOBAL_MODULE_SETTINGS_INCLUDED=1 -DJUCE_STANDALONE_APPLICATION=0 -DJUCE_WEB_BROWSER=0 -DJUCE_USE_CURL=0
 -DJUCE_VST3_CAN_REPLACE_VST2=0 -DJUCE_USE_XRANDR=0 -DJUCE_USE_XINERAMA=0 -DJUCE_USE_XSHM=0 -DJUCE_USE_XCURSOR=0
 -DJUCE_USE_XRENDER=0 -include $out/settings.h -I$modules -I/usr/include/freetype2
 -I$modules/juce_audio_processors/format_types/VST3_SDK"

compile() {  # source, name of the object
    object=$out/objects/$2.o
    [ -e "$object" ] && [ "$object" -nt "$1" ] && return
    nice g++ $flags -c "$1" -o "$object.new"
    mv "$object.new" "$object"
}
(for name in juce_gui_basics juce_core juce_events; do compile "$modules/$name/$name.cpp" "$name"; done) &
half=$!
for name in juce_audio_processors juce_graphics juce_audio_basics juce_data_structures juce_gui_extra; do
    compile "$modules/$name/$name.cpp" "$name"
done
for name in VST3 utils; do compile "$modules/juce_audio_plugin_client/juce_audio_plugin_client_$name.cpp" "client_$name"; done
compile "$here/JuceSynth.cpp" synth
wait $half

bundle=$out/JuceSynth.vst3
mkdir -p "$bundle/Contents/$(uname -m)-linux"
g++ -shared -Wl,--gc-sections -Wl,--no-undefined "$out"/objects/*.o -lfreetype -lpng -ljpeg -lz -ldl -lpthread -lrt \
    -o "$out/linked.so"
mv "$out/linked.so" "$bundle/Contents/$(uname -m)-linux/JuceSynth.so"
echo "$bundle"
