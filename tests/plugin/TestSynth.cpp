// A small polyphonic synth that sounds like one and misbehaves on request: the VST3 instrument of the tests.
//
// Three oscillators and noise -> filter -> envelope -> drive -> delay; notes start and end on their exact frame, and
// the output does not depend on the block size. Three parameters exist for the tests:
//   Leakage           what one render leaves behind for the next. None: a note that starts while no key is down starts
//                     from silence and phase zero. Instance: oscillators, LFO and delay line run on; loading the plugin
//                     anew clears them. Process: also a counter of notes that outlives the plugin's instance.
//   Nondeterministic  Clock: noise seeded by the time. Address: noise seeded by where the library was loaded, so
//                     that forks of one process agree and separate processes do not.
//   Misbehave         what goes wrong as soon as a note sounds (with -DAT_LOAD=n, choice n strikes on loading).
#include "DistrhoPlugin.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <unistd.h>
#include <vector>

START_NAMESPACE_DISTRHO

enum Misbehaviour { Nothing, Segfault, Abort, Exit, Hang, NotANumber, Silence, Leak };
enum Leakage { LeaksNothing, LeaksInInstance, LeaksInProcess };
enum Nondeterminism { Deterministic, FromClock, FromAddress };

static const size_t LEAKED_BYTES = 50u << 20;
static int notesInProcess = 0;       // outlives every instance: what Leakage "Process" shows
static std::vector<char*> leaked;    // kept on purpose

static void misbehave(int kind) {
    if (kind == Segfault) { volatile int* nowhere = nullptr; *nowhere = 1; }
    if (kind == Abort) std::abort();
    if (kind == Exit) _exit(3);
    if (kind == Hang) for (;;) usleep(100000);
    if (kind == Leak) {
        leaked.push_back(static_cast<char*>(std::malloc(LEAKED_BYTES)));
        for (size_t i = 0; i < LEAKED_BYTES; i += 4096) leaked.back()[i] = static_cast<char>(i >> 12);
    }
}

struct Spec { const char* name; float lowest, highest, start; uint32_t kind; std::vector<const char*> choices; };

static const uint32_t NUMBER = 0, WHOLE = kParameterIsInteger, SWITCH = kParameterIsBoolean | kParameterIsInteger;
static const std::vector<const char*> WAVEFORMS = {"Sine", "Saw", "Square", "Triangle"};

enum { Osc1Wave, Osc1Level, Osc1Octave, Osc1Detune, Osc2Wave, Osc2Level, Osc2Octave, Osc2Detune,
       Osc3Wave, Osc3Level, Osc3Octave, Osc3Detune, NoiseLevel, PulseWidth,
       FilterType, Cutoff, Resonance, FilterEnvelope, KeyTracking,
       FilterAttack, FilterDecay, FilterSustain, FilterRelease, AmpAttack, AmpDecay, AmpSustain, AmpRelease,
       VelocityAmount, LfoWave, LfoRate, LfoPitch, LfoCutoff, LfoLevel,
       DriveOn, Drive, DelayTime, DelayFeedback, DelayMix, Width, Voices, Volume,
       LeakageChoice, NondeterministicChoice, MisbehaveChoice, PARAMETERS };

static const std::vector<Spec>& specs() {
    static const std::vector<Spec> all = {
        {"Oscillator 1 Waveform", 0, 3, 1, WHOLE, WAVEFORMS}, {"Oscillator 1 Level", 0, 1, .8f, NUMBER, {}},
        {"Oscillator 1 Octave", -2, 2, 0, WHOLE, {}},         {"Oscillator 1 Detune", -1, 1, 0, NUMBER, {}},
        {"Oscillator 2 Waveform", 0, 3, 2, WHOLE, WAVEFORMS}, {"Oscillator 2 Level", 0, 1, .3f, NUMBER, {}},
        {"Oscillator 2 Octave", -2, 2, 0, WHOLE, {}},         {"Oscillator 2 Detune", -1, 1, .1f, NUMBER, {}},
        {"Oscillator 3 Waveform", 0, 3, 0, WHOLE, WAVEFORMS}, {"Oscillator 3 Level", 0, 1, 0, NUMBER, {}},
        {"Oscillator 3 Octave", -2, 2, -1, WHOLE, {}},        {"Oscillator 3 Detune", -1, 1, 0, NUMBER, {}},
        {"Noise Level", 0, 1, 0, NUMBER, {}},                 {"Pulse Width", .05f, .95f, .5f, NUMBER, {}},
        {"Filter Type", 0, 3, 0, WHOLE, {"Low Pass", "Band Pass", "High Pass", "Notch"}},
        {"Filter Cutoff", 0, 1, .6f, NUMBER, {}},             {"Filter Resonance", 0, 1, .2f, NUMBER, {}},
        {"Filter Envelope Amount", -1, 1, .2f, NUMBER, {}},   {"Filter Key Tracking", 0, 1, .5f, NUMBER, {}},
        {"Filter Attack", 0, 1, .1f, NUMBER, {}},             {"Filter Decay", 0, 1, .5f, NUMBER, {}},
        {"Filter Sustain", 0, 1, .5f, NUMBER, {}},            {"Filter Release", 0, 1, .4f, NUMBER, {}},
        {"Amplitude Attack", 0, 1, .1f, NUMBER, {}},          {"Amplitude Decay", 0, 1, .5f, NUMBER, {}},
        {"Amplitude Sustain", 0, 1, .7f, NUMBER, {}},         {"Amplitude Release", 0, 1, .4f, NUMBER, {}},
        {"Velocity Sensitivity", 0, 1, .5f, NUMBER, {}},
        {"LFO Waveform", 0, 3, 0, WHOLE, WAVEFORMS},          {"LFO Rate", 0, 1, .5f, NUMBER, {}},
        {"LFO To Pitch", 0, 1, .05f, NUMBER, {}},             {"LFO To Cutoff", 0, 1, .1f, NUMBER, {}},
        {"LFO To Level", 0, 1, 0, NUMBER, {}},
        {"Drive On", 0, 1, 0, SWITCH, {}},                    {"Drive Amount", 0, 1, .3f, NUMBER, {}},
        {"Delay Time", 0, 1, .5f, NUMBER, {}},                {"Delay Feedback", 0, 1, .4f, NUMBER, {}},
        {"Delay Mix", 0, 1, .2f, NUMBER, {}},                 {"Stereo Width", 0, 1, .5f, NUMBER, {}},
        {"Voices", 1, 8, 8, WHOLE, {}},                       {"Volume", -36, 12, -6, NUMBER, {}},
        {"Leakage", 0, 2, 1, WHOLE, {"None", "Instance", "Process"}},
        {"Nondeterministic", 0, 2, 0, WHOLE, {"Off", "Clock", "Address"}},
        {"Misbehave", 0, 7, 0, WHOLE, {"None", "Segfault", "Abort", "Exit", "Hang", "NaN", "Silence", "Leak"}},
    };
    return all;
}

static float waveform(int kind, double phase, float width) {
    if (kind == 0) return std::sin(6.283185307f * static_cast<float>(phase));
    if (kind == 1) return static_cast<float>(1. - 2. * phase);
    if (kind == 2) return phase < width ? 1.f : -1.f;
    return static_cast<float>(phase < .5 ? 4. * phase - 1. : 3. - 4. * phase);
}

struct Envelope {
    float level = 0;
    bool attacking = false, held = false;

    void step(float attack, float decay, float sustain, float release) {  // rates: the share of the way per frame
        if (attacking) { level += attack * (1.2f - level); if (level >= 1) { level = 1; attacking = false; } }
        else if (held) level += decay * (sustain - level);
        else level *= 1 - release;
    }
};

struct Voice {
    int pitch = -1, frame = 0, lastStart = 0;
    float velocity = 0, g = 0, k = 0, filter[2][2] = {};
    double phase[3] = {}, increment[3] = {};
    Envelope amplitude, cutoff;

    bool sounds() const { return amplitude.held || amplitude.attacking || amplitude.level > 1e-5f; }
};

class TestSynth : public Plugin {
    static const int MOST_VOICES = 8, CONTROL_FRAMES = 16;
    float value[PARAMETERS];
    double rate, lfoPhase = 0;
    float lfo = 0;
    uint32_t noise = 1;
    int started = 0, lfoFrame = 0;
    Voice voices[MOST_VOICES];
    std::vector<float> delay[2];
    size_t written = 0;

    void silence() {
        for (Voice& voice : voices) voice = Voice();
        for (int side = 0; side < 2; side++) delay[side].assign(static_cast<size_t>(rate), 0.f);
        lfoPhase = 0; lfo = 0; noise = 1; started = 0; lfoFrame = 0; written = 0;
    }

    float share(int index) const {  // an envelope time (1 ms to 5 s) as a share of the way per frame
        return 1 - std::exp(static_cast<float>(-3. / (rate * .001 * std::pow(5000., value[index]))));
    }

    float random() { noise = noise * 1664525u + 1013904223u; return static_cast<int32_t>(noise) / 2147483648.f; }

    void seedNoise() {
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (value[NondeterministicChoice] == FromClock) noise = static_cast<uint32_t>(now.tv_nsec ^ now.tv_sec << 8);
        if (value[NondeterministicChoice] == FromAddress) noise = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(&leaked) >> 4);
    }

    void noteOn(int pitch, int velocity) {
        misbehave(static_cast<int>(value[MisbehaveChoice]));
        bool down = false;
        for (const Voice& voice : voices) down = down || voice.amplitude.held;
        if (value[LeakageChoice] == LeaksNothing && !down) silence();
        if (value[NondeterministicChoice] != Deterministic) seedNoise();
        Voice* chosen = voices;
        for (int i = 0; i < static_cast<int>(value[Voices]); i++) {
            if (!voices[i].sounds()) { chosen = voices + i; break; }
            if (voices[i].lastStart < chosen->lastStart) chosen = voices + i;
        }
        const double drift = value[LeakageChoice] == LeaksInProcess ? std::fmod(.381966 * ++notesInProcess, 1.) : 0;
        const Voice before = *chosen;
        *chosen = Voice();
        for (int i = 0; i < 3; i++) chosen->phase[i] = std::fmod(before.phase[i] + drift * (i + 1), 1.);
        chosen->pitch = pitch;
        chosen->velocity = velocity / 127.f;
        chosen->lastStart = ++started;
        chosen->amplitude.attacking = chosen->amplitude.held = chosen->cutoff.attacking = chosen->cutoff.held = true;
    }

    void noteOff(int pitch) {
        for (Voice& voice : voices)
            if (voice.pitch == pitch) voice.amplitude.held = voice.amplitude.attacking = voice.cutoff.held = voice.cutoff.attacking = false;
    }

    void control(Voice& voice) {  // what changes slowly: pitches and the filter's coefficients
        for (int i = 0; i < 3; i++) {
            const float semitones = 12 * value[Osc1Octave + 4 * i] + value[Osc1Detune + 4 * i] + 2 * lfo * value[LfoPitch];
            voice.increment[i] = std::min(.45, 440. * std::exp2((voice.pitch - 69 + semitones) / 12.) / rate);
        }
        const float octaves = 10 * value[Cutoff] + 5 * value[FilterEnvelope] * voice.cutoff.level + 2 * lfo * value[LfoCutoff]
                            + value[KeyTracking] * (voice.pitch - 60) / 12.f;
        const double hertz = std::min(std::max(20. * std::exp2(octaves), 20.), .45 * rate);
        voice.g = static_cast<float>(std::tan(3.141592653589793 * hertz / rate));
        voice.k = 2 - 1.9f * value[Resonance];
    }

    float filtered(Voice& voice, int side, float input) {  // state variable filter, trapezoidal integration
        float& first = voice.filter[side][0];
        float& second = voice.filter[side][1];
        const float a1 = 1 / (1 + voice.g * (voice.g + voice.k)), v3 = input - second;
        const float band = a1 * first + a1 * voice.g * v3, low = second + a1 * voice.g * first + a1 * voice.g * voice.g * v3;
        first = 2 * band - first;
        second = 2 * low - second;
        const int type = static_cast<int>(value[FilterType]);
        if (type == 0) return low;
        if (type == 1) return band * voice.k;
        return input - voice.k * band - (type == 2 ? low : 0);
    }

    void stepLfo() {
        if (lfoFrame++ % CONTROL_FRAMES) return;
        lfo = waveform(static_cast<int>(value[LfoWave]), lfoPhase, .5f);
        lfoPhase = std::fmod(lfoPhase + CONTROL_FRAMES * .05 * std::pow(400., value[LfoRate]) / rate, 1.);
    }

    void addVoice(Voice& voice, const float* rates, float* sides) {
        if (voice.frame++ % CONTROL_FRAMES == 0) control(voice);
        voice.amplitude.step(rates[0], rates[1], value[AmpSustain], rates[2]);
        voice.cutoff.step(rates[3], rates[4], value[FilterSustain], rates[5]);
        float tones[3];
        for (int i = 0; i < 3; i++) {
            tones[i] = value[Osc1Level + 4 * i] * waveform(static_cast<int>(value[Osc1Wave + 4 * i]), voice.phase[i], value[PulseWidth]);
            voice.phase[i] += voice.increment[i];
            voice.phase[i] -= voice.phase[i] >= 1;
        }
        const float middle = tones[0] + value[NoiseLevel] * random() + (value[NondeterministicChoice] ? .01f * random() : 0);
        const float level = voice.amplitude.level * (1 - value[VelocityAmount] * (1 - voice.velocity))
                          * (1 - value[LfoLevel] * (.5f + .5f * lfo));
        for (int side = 0; side < 2; side++) {
            const float near = .5f * (1 + value[Width]), far = .5f * (1 - value[Width]);
            sides[side] += level * filtered(voice, side, middle + (side ? far : near) * tones[1] + (side ? near : far) * tones[2]);
        }
    }

    void frame(const float* rates, float* sides) {
        stepLfo();
        sides[0] = sides[1] = 0;
        for (Voice& voice : voices) if (voice.sounds()) addVoice(voice, rates, sides);
        const size_t length = delay[0].size(), behind = 1 + static_cast<size_t>((length - 2) * value[DelayTime]);
        const size_t read = (written + length - behind) % length;
        for (int side = 0; side < 2; side++) {
            if (value[DriveOn]) sides[side] = std::tanh(sides[side] * (1 + 9 * value[Drive]));
            const float echo = delay[side][read];
            delay[side][written] = sides[side] + .9f * value[DelayFeedback] * echo;
            sides[side] += value[DelayMix] * echo;
        }
        written = (written + 1) % length;
    }

    void midi(const MidiEvent& event) {
        const int status = event.data[0] & 0xf0, pitch = event.data[1] & 127, velocity = event.data[2] & 127;
        if (event.size > 3) return;
        if (status == 0x90 && velocity) noteOn(pitch, velocity);
        else if (status == 0x90 || status == 0x80) noteOff(pitch);
        else if (status == 0xb0 && (pitch == 120 || pitch == 123)) for (int i = 0; i < 128; i++) noteOff(i);
    }

public:
    TestSynth() : Plugin(PARAMETERS, 0, 0), rate(getSampleRate()) {
       #ifdef AT_LOAD
        misbehave(AT_LOAD);
       #endif
       #ifdef LOAD_SECONDS
        usleep(static_cast<useconds_t>(LOAD_SECONDS * 1e6));
       #endif
        for (int i = 0; i < PARAMETERS; i++) value[i] = specs()[i].start;
        silence();
    }

protected:
    const char* getLabel() const override { return "TestSynth"; }
    const char* getMaker() const override { return "datatools"; }
    const char* getLicense() const override { return "Apache-2.0"; }
    uint32_t getVersion() const override { return d_version(1, 0, 0); }
    int64_t getUniqueId() const override { return d_cconst('D', 't', 'T', 's'); }

    void initParameter(uint32_t index, Parameter& parameter) override {
        const Spec& spec = specs()[index];
        std::string symbol = spec.name;
        for (char& c : symbol) c = c == ' ' ? '_' : static_cast<char>(std::tolower(c));
        parameter.hints = kParameterIsAutomatable | spec.kind;
        parameter.name = spec.name;
        parameter.symbol = symbol.c_str();
        parameter.unit = index == Volume ? "dB" : "";
        parameter.ranges = ParameterRanges(spec.start, spec.lowest, spec.highest);
        if (spec.choices.empty()) return;
        parameter.enumValues.count = static_cast<uint8_t>(spec.choices.size());
        parameter.enumValues.restrictedMode = true;
        parameter.enumValues.values = new ParameterEnumerationValue[spec.choices.size()];
        for (size_t i = 0; i < spec.choices.size(); i++) {
            parameter.enumValues.values[i].value = static_cast<float>(i);
            parameter.enumValues.values[i].label = spec.choices[i];
        }
    }

    float getParameterValue(uint32_t index) const override { return value[index]; }
    void setParameterValue(uint32_t index, float plain) override { value[index] = plain; }
    void sampleRateChanged(double newRate) override { rate = newRate; silence(); }

    void run(const float**, float** outputs, uint32_t frames, const MidiEvent* events, uint32_t count) override {
        const float rates[6] = {share(AmpAttack), share(AmpDecay), share(AmpRelease),
                                share(FilterAttack), share(FilterDecay), share(FilterRelease)};
        const float gain = .3f * std::pow(10.f, value[Volume] / 20);
        uint32_t next = 0;
        for (uint32_t at = 0; at < frames; at++) {
            while (next < count && events[next].frame <= at) midi(events[next++]);
            float sides[2];
            frame(rates, sides);
            bool sounding = false;
            for (const Voice& voice : voices) sounding = sounding || voice.sounds();
            float scale = value[MisbehaveChoice] == Silence ? 0 : gain;
            if (value[MisbehaveChoice] == NotANumber && sounding) scale = NAN;
           #ifdef MONO
            outputs[0][at] = scale * .5f * (sides[0] + sides[1]);
           #else
            for (int side = 0; side < 2; side++) outputs[side][at] = scale * sides[side];
           #endif
        }
        while (next < count) midi(events[next++]);
    }

    DISTRHO_DECLARE_NON_COPYABLE_WITH_LEAK_DETECTOR(TestSynth)
};

Plugin* createPlugin() { return new TestSynth(); }

END_NAMESPACE_DISTRHO

#ifdef TWO_PLUGINS  // one bundle that offers two classes of plugin: the framework's factory, asked twice
#define GetPluginFactory OnePluginFactory
#include "DistrhoPluginMain.cpp"
#undef GetPluginFactory

START_NAMESPACE_DISTRHO

struct TwoPluginFactory : dpf_factory {
    TwoPluginFactory() {
        v1.num_classes = [](void*) -> int32_t { return 2; };
        v1.get_class_info = [](void* self, int32_t i, v3_class_info* info) { return described(get_class_info(self, 0, info), i, info); };
        v2.get_class_info_2 = [](void* self, int32_t i, v3_class_info_2* info) { return described(get_class_info_2(self, 0, info), i, info); };
        v3.get_class_info_utf16 = [](void* self, int32_t i, v3_class_info_3* info) {
            return described(get_class_info_utf16(self, 0, info), i, info); };
        v1.create_instance = [](void* self, const v3_tuid id, const v3_tuid interface, void** instance) {
            v3_tuid wanted;
            std::memcpy(wanted, id, sizeof(v3_tuid));
            wanted[15] = 0;
            return create_instance(self, wanted, interface, instance); };
    }

    template <class Info> static v3_result described(v3_result result, int32_t i, Info* info) {
        info->class_id[15] = static_cast<uint8_t>(i);
        info->name[std::strlen(DISTRHO_PLUGIN_NAME) + 1] = 0;
        info->name[std::strlen(DISTRHO_PLUGIN_NAME)] = i ? '2' : '1';
        return result;
    }
};

END_NAMESPACE_DISTRHO

DISTRHO_PLUGIN_EXPORT const void* GetPluginFactory(void);
const void* GetPluginFactory(void) {
    USE_NAMESPACE_DISTRHO;
    dpf_factory** const factory = new dpf_factory*;
    *factory = new TwoPluginFactory;
    return static_cast<void*>(factory);
}
#else
#include "DistrhoPluginMain.cpp"
#endif
