// policies/presets: configs with published numbers. Each can be run, and each number has its source beside it.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "test_paths.h"

namespace moectl {
namespace {

const std::string kFolder = MOECTL_SOURCE_DIR "/policies/presets";

TEST(Presets, HoldThePublishedNumbers) {
  struct Published {
    const char* policy;
    std::map<std::string, double> numbers;
    double aux_loss_weight;
  };
  const std::map<std::string, Published> all = {
      {"deepseek_v3", {"sign_bias", {{"step", 1e-3}}, 1e-4}},
      {"moonlight", {"sign_bias", {{"step", 1e-3}}, 1e-4}},
      {"torchtitan", {"sign_bias", {{"step", 1e-3}}, 0}},
      {"megatron", {"sign_bias", {{"step", 1e-3}}, 0}},
      {"trinity", {"tanh_momentum_bias", {{"step", 5e-4}, {"steepness", 2}, {"momentum", 0.5}}, 0}},
      {"longcat", {"proportional_bias", {{"step", 1e-2}}, 0}},
      {"kimi_k3", {"quantile_bias", {{"gain", 1}}, 0}},
      {"megatron_quantile", {"quantile_bias", {{"gain", 1}}, 0}}};
  std::size_t seen = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder)) {
    SCOPED_TRACE(entry.path().string());
    const auto published = all.find(entry.path().stem().string());
    ASSERT_NE(published, all.end());
    const ControllerConfig config = load_config(entry.path().string());
    EXPECT_EQ(config.expert_bias.policy, published->second.policy);
    for (const auto& [name, value] : published->second.numbers) {
      EXPECT_EQ(config.expert_bias.options.number(name), value) << name;
    }
    EXPECT_EQ(config.aux_loss_weight.initial, published->second.aux_loss_weight);
    EXPECT_FALSE(config.safety.responsiveness);
    EXPECT_EQ(to_yaml(parse_config(to_yaml(config))), to_yaml(config));
    Controller controller(config);
    ++seen;
  }
  EXPECT_EQ(seen, all.size());
}

TEST(Presets, EveryNumberHasItsSourceBesideIt) {
  for (const auto& entry : std::filesystem::directory_iterator(kFolder)) {
    std::ifstream file(entry.path());
    std::stringstream text;
    text << file.rdbuf();
    EXPECT_NE(text.str().find("# Source"), std::string::npos) << entry.path();
    for (std::string line; std::getline(text, line);) {
      const std::size_t colon = line.find(": ");
      if (line.starts_with("#") || line.starts_with("version") || colon == std::string::npos) continue;
      const bool number = line.find_first_of("0123456789", colon) == colon + 2;
      if (number) {
        EXPECT_NE(line.find(" # "), std::string::npos) << entry.path() << ": " << line;
      }
    }
  }
}

}  // namespace
}  // namespace moectl
