// A synth of 772 parameters under JUCE's own VST3 wrapper: what the benchmark of datatools.vst calls a JUCE-class plugin.
//
// Sixteen operators of 48 parameters each (their tone and envelope, how much every operator modulates their phase, and a
// sequence of sixteen levels) and four for the whole. Built by build.sh with Debian's JUCE (GPL, at build time only).
#include <juce_audio_processors/juce_audio_processors.h>

using namespace juce;

static const int OPERATORS = 16, MOST_VOICES = 8, CONTROL_FRAMES = 32;

class JuceSynth : public AudioProcessor {
    enum { Wave, Level, Coarse, Fine, Pan, Attack, Decay, Sustain, Release, Velocity, KeyScaling, Feedback, Phase, Tremolo, Rate, On, OWN };

    struct Voice {
        int pitch = -1, frame = 0;
        bool held = false;
        float velocity = 0, levels[OPERATORS] = {}, steps[OPERATORS] = {}, last[OPERATORS] = {};
        double phase[OPERATORS] = {};
        bool falling[OPERATORS] = {};
        bool sounds() const { return held || *std::max_element(levels, levels + OPERATORS) > 1e-5f; }
    };

    std::vector<RangedAudioParameter*> all;
    std::array<Voice, MOST_VOICES> voices;
    float values[OPERATORS][48] = {};
    std::vector<std::pair<int, float>> modulators[OPERATORS];
    double rate = 44100;
    int next = 0;

    template <class Kind, class... Rest> void add(const String& name, Rest&&... rest) {
        auto* parameter = new Kind(ParameterID(name.toLowerCase().replaceCharacter(' ', '_'), 1), name, std::forward<Rest>(rest)...);
        addParameter(parameter);
        all.push_back(parameter);
    }

    void addNumber(const String& name, float start, float low = 0, float high = 1) {
        add<AudioParameterFloat>(name, NormalisableRange<float>(low, high), start);
    }

    void readParameters() {
        for (int i = 0; i < OPERATORS; i++) {
            modulators[i].clear();
            for (int k = 0; k < 48; k++) values[i][k] = all[(size_t) (i * 48 + k)]->convertFrom0to1(all[(size_t) (i * 48 + k)]->getValue());
            for (int k = 0; k < OPERATORS; k++) if (values[i][OWN + k] > 0) modulators[i].push_back({k, values[i][OWN + k]});
        }
    }

    float share(float time) const { return 1 - std::exp((float) (-3. / (rate * .001 * std::pow(5000., time)))); }

    void control(Voice& voice, int i) {
        const float* value = values[i];
        float& level = voice.levels[i];
        const float to = voice.held ? (voice.falling[i] ? value[Sustain] : 1.05f) : 0.f;
        const float speed = share(voice.held ? (voice.falling[i] ? value[Decay] : value[Attack]) : value[Release]);
        level += (1 - std::pow(1 - speed, (float) CONTROL_FRAMES)) * (to - level);
        if (level >= 1) voice.falling[i] = true;
        const double seconds = voice.frame / rate;
        voice.steps[i] = value[OWN + OPERATORS + (int) (seconds * (1 + 15 * value[Rate])) % 16]
                       * (1 - value[Tremolo] * (.5f + .5f * (float) std::sin(seconds * 30)))
                       * (1 - value[Velocity] * (1 - voice.velocity)) * std::exp2(-value[KeyScaling] * (float) voice.pitch / 24);
    }

    void frame(Voice& voice, float& left, float& right) {
        const double base = 440. * std::exp2((voice.pitch - 69) / 12.) / rate;
        for (int i = 0; i < OPERATORS; i++) {
            const float* value = values[i];
            if (value[On] < .5f) continue;
            if (voice.frame % CONTROL_FRAMES == 0) control(voice, i);
            double phase = voice.phase[i] + value[Phase] + value[Feedback] * voice.last[i];
            for (const auto& [k, amount] : modulators[i]) phase += amount * voice.last[k];
            voice.phase[i] += base * value[Coarse] * (1 + .05 * value[Fine]);
            voice.phase[i] -= std::floor(voice.phase[i]);
            phase -= std::floor(phase);
            const float tone = value[Wave] < .5f ? std::sin(6.2831853f * (float) phase)
                             : value[Wave] < 1.5f ? (float) (1 - 2 * phase) : phase < .5 ? 1.f : -1.f;
            voice.last[i] = tone * voice.levels[i] * voice.steps[i];
            left += voice.last[i] * value[Level] * (1 - value[Pan]);
            right += voice.last[i] * value[Level] * value[Pan];
        }
        voice.frame++;
    }

    void midi(const MidiMessage& message) {
        if (message.isNoteOn()) {
            Voice& voice = voices[(size_t) (next++ % MOST_VOICES)];
            voice = Voice();
            voice.pitch = message.getNoteNumber();
            voice.velocity = message.getFloatVelocity();
            voice.held = true;
        }
        for (Voice& voice : voices)
            if ((message.isNoteOff() && voice.pitch == message.getNoteNumber()) || message.isAllNotesOff()) voice.held = false;
    }

public:
    JuceSynth() : AudioProcessor(BusesProperties().withOutput("Output", AudioChannelSet::stereo(), true)) {
        const char* names[] = {"Waveform", "Level", "Coarse", "Fine", "Pan", "Attack", "Decay", "Sustain", "Release", "Velocity",
                               "Key Scaling", "Feedback", "Phase", "Tremolo", "Step Rate", "On"};
        const float starts[] = {0, .4f, 0, 0, .5f, .1f, .5f, .7f, .4f, .5f, .2f, 0, 0, 0, .2f, 0};
        for (int i = 1; i <= OPERATORS; i++) {
            const String name = "Operator " + String(i) + " ";
            for (int k = 0; k < OWN; k++) {
                if (k == Wave) add<AudioParameterChoice>(name + names[k], StringArray{"Sine", "Saw", "Square"}, 0);
                else if (k == Coarse) add<AudioParameterInt>(name + names[k], 1, 12, i);
                else if (k == On) add<AudioParameterBool>(name + names[k], i <= 4);
                else addNumber(name + names[k], starts[k]);
            }
            for (int k = 1; k <= OPERATORS; k++) addNumber(name + "From " + String(k), k == i + 1 && i < 4 ? .2f : 0.f);
            for (int k = 1; k <= 16; k++) addNumber(name + "Step " + String(k), 1);
        }
        addNumber("Volume", -12, -36, 12);
        addNumber("Width", 1);
        addNumber("Drive", 0);
        addNumber("Cutoff", 1);
    }

    const String getName() const override { return JucePlugin_Name; }
    bool acceptsMidi() const override { return true; }
    bool producesMidi() const override { return false; }
    double getTailLengthSeconds() const override { return 5; }
    int getNumPrograms() override { return 1; }
    int getCurrentProgram() override { return 0; }
    void setCurrentProgram(int) override {}
    const String getProgramName(int) override { return {}; }
    void changeProgramName(int, const String&) override {}
    bool hasEditor() const override { return false; }
    AudioProcessorEditor* createEditor() override { return nullptr; }
    void releaseResources() override {}
    void prepareToPlay(double newRate, int) override { rate = newRate; voices = {}; }
    bool isBusesLayoutSupported(const BusesLayout& layout) const override { return layout.getMainOutputChannelSet() == AudioChannelSet::stereo(); }

    void getStateInformation(MemoryBlock& block) override {
        MemoryOutputStream stream(block, false);
        for (auto* parameter : all) stream.writeFloat(parameter->getValue());
    }

    void setStateInformation(const void* data, int size) override {
        MemoryInputStream stream(data, (size_t) size, false);
        for (auto* parameter : all) if (!stream.isExhausted()) parameter->setValueNotifyingHost(stream.readFloat());
    }

    void processBlock(AudioBuffer<float>& buffer, MidiBuffer& events) override {
        ScopedNoDenormals fast;
        readParameters();
        const auto global = [this](size_t k) { auto* parameter = all[all.size() - 4 + k]; return parameter->convertFrom0to1(parameter->getValue()); };
        const float gain = Decibels::decibelsToGain(global(0)), width = global(1), drive = 1 + 9 * global(2);
        auto event = events.begin();
        for (int at = 0; at < buffer.getNumSamples(); at++) {
            for (; event != events.end() && (*event).samplePosition <= at; ++event) midi((*event).getMessage());
            float left = 0, right = 0;
            for (Voice& voice : voices) if (voice.sounds()) frame(voice, left, right);
            const float middle = .5f * (left + right), side = .5f * width * (left - right);
            buffer.setSample(0, at, gain * std::tanh(drive * (middle + side)));
            buffer.setSample(1, at, gain * std::tanh(drive * (middle - side)));
        }
    }
};

AudioProcessor* JUCE_CALLTYPE createPluginFilter();
AudioProcessor* JUCE_CALLTYPE createPluginFilter() { return new JuceSynth(); }
