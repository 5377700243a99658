// Runs a controller on a trace through C and through C++, and writes both states: same_bits CONFIG TRACE C_OUT CPP_OUT.
// The trace holds a line a layer-step: the chosen experts of all tokens.
#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "moectl.h"
#include "moectl/controller.h"

int main(int count, char** arguments) {
  if (count != 5) return 2;
  moectl::Controller cpp(moectl::load_config(arguments[1]));
  moectl_controller* c = nullptr;
  if (moectl_new_from_file(arguments[1], &c)) return 1;
  const int layers = cpp.config().model.layers;
  const auto top_k = static_cast<std::size_t>(cpp.config().model.top_k);
  const double loss = 2.5;
  std::ifstream trace(arguments[2]);
  int layer = 0;
  for (std::string line; std::getline(trace, line);) {
    std::istringstream words(line);
    std::vector<std::int64_t> experts;
    for (std::int64_t expert = 0; words >> expert;) experts.push_back(expert);
    cpp.record(layer, {.experts = experts});
    moectl_batch batch{};
    batch.size = sizeof batch;
    batch.tokens = experts.size() / top_k;
    batch.experts = experts.data();
    if (moectl_record(c, layer, &batch, -1)) return 1;
    if (++layer < layers) continue;
    layer = 0;
    cpp.step({.loss = loss});
    moectl_step_info info{};
    info.size = sizeof info;
    info.loss = &loss;
    if (moectl_step(c, &info)) return 1;
  }
  char* state = nullptr;
  std::size_t size = 0;
  if (moectl_save(c, &state, &size)) return 1;
  std::ofstream(arguments[3], std::ios::binary).write(state, static_cast<std::streamsize>(size));
  std::ofstream(arguments[4], std::ios::binary) << cpp.save();
  moectl_free_text(state);
  moectl_free(c);
}
