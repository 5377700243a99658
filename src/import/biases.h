// The selection biases that a file holds, whatever wrote it.
#pragma once

#include <string>

#include "moectl/bias_file.h"

namespace moectl {

struct BiasSource {
  /// Name of the tensors in a safetensors file, with {} in place of the layer's number. Empty = every tensor whose name
  /// ends with a known one (e_score_correction_bias, expert_bias, score_bias).
  std::string tensor{};
  int first_layer = 0;    ///< Id of the first row of an array without names.
  bool deployed = false;  ///< Of a run log or a state: without what serves the next batch alone.
};

/// Reads a run log (the values in force at its end), a saved state, a file of biases, an .npy array [layers, experts] or
/// [experts], JSON of the same shapes, or a safetensors checkpoint. Throws ImportError that names the file.
LayerBiases biases_in(const std::string& path, const BiasSource& source = {});

}  // namespace moectl
