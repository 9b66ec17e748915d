// What the DISTRHO Plugin Framework asks to know about the test instrument. build.py passes NAME and the variant.
#pragma once

#ifndef NAME
#define NAME "Test Synth"
#endif
#ifdef MONO
#define DISTRHO_PLUGIN_NUM_OUTPUTS 1
#else
#define DISTRHO_PLUGIN_NUM_OUTPUTS 2
#endif

#define DISTRHO_PLUGIN_BRAND "datatools"
#define DISTRHO_PLUGIN_NAME NAME
#define DISTRHO_PLUGIN_URI "urn:datatools:test-synth"
#define DISTRHO_PLUGIN_HAS_UI 0
#define DISTRHO_PLUGIN_IS_RT_SAFE 1
#define DISTRHO_PLUGIN_IS_SYNTH 1
#define DISTRHO_PLUGIN_NUM_INPUTS 0
#define DISTRHO_PLUGIN_WANT_MIDI_INPUT 1
