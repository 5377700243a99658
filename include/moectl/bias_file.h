// A file of biases by layer, as `moectl biases` writes one and `expert_bias.initial` reads one:
//
//   {"format":"moectl-biases","version":1,"layers":{"3":[0.01,-0.02],"4":[0,0]}}
#pragma once

#include <map>
#include <string>
#include <vector>

namespace moectl {

/// The biases of each layer [N], by the model's own id of the layer.
using LayerBiases = std::map<int, std::vector<double>>;

/// Throws ConfigError with the file and what is wrong.
LayerBiases read_biases(const std::string& path);
/// As text, one layer a line. Reads back exactly.
std::string biases_json(const LayerBiases& biases);

}  // namespace moectl
