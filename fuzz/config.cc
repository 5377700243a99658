#include "moectl/config.h"

#include "fuzz/choices.h"
#include "fuzz/memory_file.h"
#include "moectl/controller.h"
#include "moectl/feasibility.h"

namespace moectl::fuzz {

void config(Bytes bytes) {
  ControllerConfig config;
  try {
    config = parse_config(text_of(bytes), "c.yaml");
  } catch (const ConfigError& error) {
    require_message(error);
    return;
  }
  const std::string json = to_json(config);
  require(to_json(parse_config(to_yaml(config), "written.yaml")) == json, "YAML reads back as the config");
  require(to_json(parse_config(json, "written.json")) == json, "JSON reads back as the config");
  // Larger ones cost time and show no more.
  if (config.model.layers * std::int64_t{config.model.experts} > 64 || config.monitor.trend_window > 100 ||
      config.model.delay > 10 || config.model.domains.size() > 4 || config.model.split_sequences > 4 ||
      config.timeline.size() > 4 || config.model.experts == 0)
    return;
  judge_bands(config);
  try {
    Controller controller(config);
    for (int step = 0; step < 3; ++step) controller.step({.loss = 2.0});
    for (const int layer : controller.layers()) {
      for (const double bias : controller.bias(layer)) require(bias - bias == 0, "biases are finite");
    }
    const std::string state = controller.save();
    controller.load(state);
    require(controller.save() == state, "a state loads as itself");
  } catch (const ConfigError& error) {
    require_message(error);  // a file of biases that is not there
  }
}

}  // namespace moectl::fuzz
