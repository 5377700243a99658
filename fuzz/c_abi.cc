#include "moectl.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/printable.h"
#include "fuzz/choices.h"

namespace moectl::fuzz {
namespace {

constexpr const char* kConfigs[] = {
    ("version: 1\nmodel: {layers: 2, experts: 4, top_k: 2}\nexpert_bias: {policy: adaptive_bias}\n"),
    ("version: 1\nmodel: {layers: 1, experts: 3, top_k: 1, domains: [a, b]}\nlag: 1\n"
     "expert_bias: {policy: sign_bias}\naux_loss_weight: {policy: pi, scope: model, initial: 0.01, "
     "options: {metric: load_cv, target: 0.3}}\nguard: {enabled: true}\n"),
    ("version: 1\nlayers: [{ids: [3], experts: 4}, {ids: [7], experts: 2}]\nmodel: {top_k: 1}\n"
     "expert_bias: {policy: quantile_bias}\nhealth: {}\n")};

struct Freed {
  void operator()(char* text) const { moectl_free_text(text); }
};
using Text = std::unique_ptr<char, Freed>;

/// The codes that a call may return; its words.
void require_code(int code) {
  require(code >= MOECTL_OK && code <= MOECTL_FAILED, "a call returns one of its codes");
  if (code != MOECTL_OK) require(std::strlen(moectl_error()) > 0, "a call that fails says why");
}

int layer_of(Choices& choices) {
  return choices.one_of({0, 1, 3, 7, -1, 2, 1 << 30, INT32_MIN});
}

}  // namespace

void c_abi(Bytes bytes) {
  Choices choices(bytes);
  moectl_controller* made = nullptr;
  const std::size_t which = choices.below(4);
  if (which == 3) {
    const int code = moectl_new(text_of(bytes.subspan(1)).c_str(), nullptr, &made);
    require_code(code);
    require((code == MOECTL_OK) == (made != nullptr), "a controller is made or not");
    moectl_free(made);
    return;
  }
  require(moectl_new(kConfigs[which], "c", &made) == MOECTL_OK, "the config is good");
  const std::unique_ptr<moectl_controller, decltype(&moectl_free)> owner(made, moectl_free);
  std::string saved, saved_layer;
  for (int call = 0; call < 200 && !choices.done(); ++call) {
    const int layer = layer_of(choices);
    std::size_t experts = 0, top_k = 0;
    const bool known = moectl_shape(made, layer, &experts, &top_k) == MOECTL_OK;
    const std::size_t n = known ? experts : 4, k = known ? top_k : 2;
    switch (choices.below(18)) {
      case 0: {
        const std::size_t tokens = choices.below(9);
        std::vector<std::int64_t> chosen, ids, domains;
        std::vector<std::int32_t> chosen32;
        std::vector<std::uint8_t> mask;
        std::vector<float> top, scores;
        const bool odd = choices.flag();
        for (std::size_t t = 0; t < tokens; ++t) {
          for (std::size_t j = 0; j < k; ++j)
            chosen.push_back(odd ? choices.integer() : static_cast<std::int64_t>((choices.byte() + j) % n));
          for (std::size_t j = 0; j <= k; ++j)
            top.push_back(odd ? static_cast<float>(choices.number()) : 0.5F - 0.1F * static_cast<float>(j));
          for (std::size_t i = 0; i < n; ++i)
            scores.push_back(static_cast<float>(odd ? choices.number() : 0.25));
          ids.push_back(odd ? choices.integer() : static_cast<std::int64_t>(t / 2));
          domains.push_back(odd ? choices.integer() : static_cast<std::int64_t>(t % 2));
          mask.push_back(choices.byte() % 4 != 0);
        }
        for (const std::int64_t expert : chosen) chosen32.push_back(static_cast<std::int32_t>(expert));
        const std::uint8_t given = choices.byte();
        const std::int64_t dropped = choices.integer();
        moectl_batch batch{};
        batch.size = sizeof batch;
        batch.tokens = tokens;
        (given & 1 ? void(batch.experts32 = chosen32.data()) : void(batch.experts = chosen.data()));
        if (given & 2) batch.mask = mask.data();
        if (given & 4) batch.sequence_ids = ids.data();
        if (given & 8) batch.top_values = top.data();
        if (given & 16) batch.biased_scores = scores.data();
        if (given & 32) batch.probabilities = scores.data();
        if (given & 64) batch.domain_ids = domains.data();
        if (given & 128) batch.dropped = &dropped;
        if (odd && choices.flag()) batch.sequence_length = choices.integer();
        require_code(moectl_record(made, layer, &batch,
                                   choices.one_of<std::int64_t>({-1, 0, 1, INT64_MAX, INT64_MIN})));
        break;
      }
      case 1: {
        std::vector<std::int64_t> counts(choices.one_of<std::size_t>({n, n, 2 * n, 6, 0, 1}));
        for (std::int64_t& count : counts) count = choices.flag() ? choices.byte() : choices.integer();
        std::vector<std::int64_t> tokens = {choices.integer(), choices.integer()};
        require_code(moectl_record_counts(made, layer, counts.data(), counts.size(),
                                          choices.flag() ? tokens.data() : nullptr));
        break;
      }
      case 2: {
        const std::vector<std::int64_t> chosen(3 * k, static_cast<std::int64_t>(choices.below(n)));
        std::vector<float> scores(3 * n);
        for (float& score : scores) score = static_cast<float>(choices.number());
        require_code(moectl_check_choices(made, layer, 3, chosen.data(), scores.data(),
                                          choices.flag() ? scores.data() : nullptr));
        break;
      }
      case 3:
        require_code(
            moectl_say(made, choices.one_of({"wiring", "config", "x", ""}), layer,
                       std::string(choices.below(256), static_cast<char>(choices.byte() | 1)).c_str()));
        break;
      case 4: {
        std::vector<double> bias(choices.one_of<std::size_t>({n, 2 * n, 6, 0}));
        for (double& value : bias) value = choices.number();
        require_code(moectl_adopt(made, layer, bias.data(), bias.size()));
        break;
      }
      case 5:
        require_code(moectl_adopt_aux_loss_weight(made, layer, choices.number()));
        require_code(moectl_adopt_temperature(made, layer, choices.number()));
        break;
      case 6:
        require_code(moectl_freeze(made, layer, choices.flag()));
        require_code(moectl_hold(made, choices.flag()));
        require_code(moectl_begin_at(made, static_cast<std::int64_t>(choices.word())));
        require_code(
            moectl_record_value(made, layer, "router_condition", static_cast<double>(choices.word())));
        break;
      case 7: {
        char* text = nullptr;
        std::size_t size = 0;
        require_code(moectl_save(made, &text, &size));
        const Text freed(text);
        saved.assign(text, size);
        break;
      }
      case 8: {
        char* text = nullptr;
        std::size_t size = 0;
        const int code = moectl_save_layer(made, layer, &text, &size);
        require_code(code);
        const Text freed(text);
        if (code == MOECTL_OK) saved_layer.assign(text, size);
        break;
      }
      case 9: {
        std::string state = choices.flag() ? saved : saved_layer;
        if (!state.empty() && choices.flag()) {
          char& byte = state[choices.word() % state.size()];
          byte = static_cast<char>(byte ^ choices.byte());
        }
        if (choices.below(4) == 0) state.resize(choices.word() % (state.size() + 1));
        char* kept = nullptr;
        const int keep = choices.one_of({0, 1, 2, -1});
        require_code(choices.flag()
                         ? moectl_load(made, state.data(), state.size(), keep, &kept)
                         : moectl_load_layer(made, layer, state.data(), state.size(), keep, &kept));
        const Text freed(kept);
        break;
      }
      case 10: {
        char* text = nullptr;
        require_code(choices.flag() ? moectl_report_json(made, choices.flag(), &text)
                                    : moectl_config(made, &text));
        const Text freed(text);
        break;
      }
      case 11: {
        moectl_figures figures{};
        figures.size = choices.one_of<std::size_t>({sizeof figures, 8, 16, 0, 1, sizeof figures});
        require_code(moectl_figures_of(made, &figures));
        break;
      }
      case 12: {
        static const auto sum = [](void* user, std::int64_t* values, std::size_t size) {
          const int kind = *static_cast<int*>(user);
          if (kind == 1) moectl_set_error("it failed");
          if (kind >= 2 && size > 0)
            values[static_cast<std::size_t>(kind) % size] = kind == 2 ? INT64_MAX : -1;
          return kind == 1 ? 1 : 0;
        };
        static int kinds[] = {0, 1, 2, 3, 5, 9, 17};
        int* kind = &kinds[choices.below(7)];
        require_code(moectl_set_reduction(made, choices.flag() ? +sum : nullptr, kind));
        break;
      }
      case 13: {
        static const auto take = [](void* user, const char* text, std::size_t size) {
          return user == nullptr && size > 0 && text[size - 1] == '\n' ? 0 : 1;
        };
        require_code(moectl_set_log(made, choices.flag() ? +take : nullptr, nullptr));
        break;
      }
      default: {
        const double loss = choices.number(), norm = choices.number();
        const std::int64_t mixture[] = {choices.integer(), choices.byte()};
        moectl_step_info info{};
        info.size = choices.one_of<std::size_t>({sizeof info, sizeof info, 16, 8});
        if (choices.flag()) info.loss = &loss;
        if (choices.flag()) info.gradient_norm = &norm;
        info.skipped = choices.below(8) == 0;
        if (choices.flag()) info.next_mixture = mixture;
        require_code(moectl_step(made, choices.flag() ? &info : nullptr));
        break;
      }
    }
    int ids[8];
    std::size_t layers = 0;
    require(moectl_layers(made, nullptr, 0, &layers) == MOECTL_OK && layers <= 2 &&
                moectl_layers(made, ids, layers, &layers) == MOECTL_OK,
            "the layers stay");
    for (std::size_t l = 0; l < layers; ++l) {
      double bias[4], scalar = 0;
      std::size_t size = 0, choices_a_token = 0;
      require(moectl_shape(made, ids[l], &size, &choices_a_token) == MOECTL_OK, "a layer has a shape");
      require(moectl_biases(made, ids[l], bias, size) == MOECTL_OK, "biases can be read at any time");
      for (std::size_t i = 0; i < size; ++i)
        require(std::abs(bias[i]) <= 16, "biases are within their limits");
      require(moectl_aux_loss_weight(made, ids[l], &scalar) == MOECTL_OK && scalar >= 0 && scalar <= 0.1,
              "the weight is within its limits");
      require(moectl_temperature(made, ids[l], &scalar) == MOECTL_OK && scalar >= 0.1 && scalar <= 10,
              "the temperature is within its limits");
    }
  }
}

}  // namespace moectl::fuzz
