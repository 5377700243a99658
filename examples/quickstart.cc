// The whole loop without a model: a made-up router that favours a few experts, and the controller that evens
// it out.
#include <cstdio>
#include <random>
#include <vector>

#include "moectl/controller.h"

int main() {
  constexpr int kExperts = 8, kTokens = 4096;
  moectl::ControllerConfig config;
  config.model = {.layers = 1, .experts = kExperts, .top_k = 1, .tokens_per_step = kTokens};
  config.expert_bias.policy = "sign_bias";
  config.expert_bias.options.set("step", 0.01);
  config.expert_bias.limits.rate = 0.01;
  moectl::Controller controller(config);

  std::mt19937 random(1);
  std::normal_distribution<double> noise;
  for (int step = 0; step < 201; ++step) {
    std::vector<std::int64_t> chosen(kTokens);
    for (auto& expert : chosen) {  // the router prefers low indices; its choice is the largest biased score
      double best = -1e9;
      for (int i = 0; i < kExperts; ++i) {
        const double score = noise(random) - 0.2 * i + controller.bias(0)[static_cast<std::size_t>(i)];
        if (score > best) best = score, expert = i;
      }
    }
    controller.record(0, {.experts = chosen});
    const auto& report = controller.step();
    if (step % 40 == 0) {
      const moectl::Metrics& m = *report.layers[0].metrics;
      std::printf("step %3d  MaxVio %.3f (noise floor %.3f)  bias of the last expert %+.2f\n", step,
                  *m.max_vio, *m.noise_floor_max_vio, controller.bias(0)[kExperts - 1]);
    }
  }
}
