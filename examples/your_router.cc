// A model that knows nothing of this library, with its own router in the manner of DeepSeek-V3, and every call that its
// training loop needs: docs/your-loop.md walks through it. Calls of the library stand behind "moectl:".
//
//   your_router [--steps N] [--seed N] [--policy FILE] [--log FILE] [--save FILE] [--resume FILE]
//               [--mistake NAME] [--mend-at STEP]
//
// --mistake makes one of the classic mistakes until --mend-at, to see what the controller says about it: forget-bias,
// wrong-layer, wrong-sign, swap-storage, no-top-values, shadow-then-active, replayed-routes.
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "moectl/config.h"
#include "moectl/run_log.h"
#include "moectl/torch/controller.h"
#include "moectl/torch/evaluation.h"
#include "your_router_parts.h"

namespace {

using torch::Tensor;

constexpr std::int64_t kLayers = 3, kExperts = 16, kGroups = 4, kGroupsKept = 2, kTopK = 2;
constexpr std::int64_t kWidth = 32, kHidden = 32, kMicroBatches = 4;
constexpr std::int64_t kSwitchToActive = 100, kOverflowEvery = 50;

// ---- The model ----

/// What a forward pass meets besides the tokens.
struct Pass {
  moectl::TorchController* controller;
  moectl::EvaluationMeter* meter = nullptr;  // told instead of the controller, if given
  Tensor mask{};
  std::int64_t micro_batch = -1;
  std::string mistake{};
};

struct Routed {
  Tensor experts, gates;         // [T, k]
  Tensor scores, biased_scores;  // [T, N]
  Tensor shares;                 // [T, N] of the scores, with their gradient
  Tensor top_values;             // [T, k+1]
};

/// Sigmoid scores; a correction bias for the choice alone; the best groups, then the best experts in them.
struct RouterImpl : torch::nn::Module {
  explicit RouterImpl(const Tensor& correction_bias) {
    weight = register_parameter("weight", torch::randn({kExperts, kWidth}) / std::sqrt(double{kWidth}));
    bias = register_buffer("e_score_correction_bias", correction_bias);
  }

  Routed forward(const Tensor& x, const Tensor& correction, const Tensor& replayed) const {
    const Tensor scores = x.to(torch::kFloat).matmul(weight.t()).sigmoid();
    Routed out;
    {
      const torch::NoGradGuard no_grad;
      out.scores = scores.detach();
      const Tensor biased = out.scores + correction;
      const Tensor groups = std::get<0>(biased.view({-1, kGroups, kExperts / kGroups}).topk(2, -1)).sum(-1);
      const Tensor kept = std::get<1>(groups.topk(kGroupsKept, -1));
      const Tensor lost = torch::ones_like(groups, torch::kBool).scatter_(1, kept, false);
      out.biased_scores = biased.masked_fill(lost.repeat_interleave(kExperts / kGroups, 1),
                                             -std::numeric_limits<float>::infinity());
      const auto best = out.biased_scores.topk(kTopK + 1, -1);  // one more than needed: the runner-up
      out.top_values = std::get<0>(best);
      out.experts = replayed.defined() ? replayed : std::get<1>(best).narrow(1, 0, kTopK).contiguous();
    }
    out.shares = scores / scores.sum(-1, true);
    const Tensor chosen = scores.gather(1, out.experts);  // gates are of the scores without the bias
    out.gates = chosen / (chosen.sum(-1, true) + 1e-9);
    return out;
  }

  Tensor weight, bias;
};
TORCH_MODULE(Router);

/// N Σ f_i P_i over the real tokens, f_i the share of the choices and P_i that of the scores: 1 where both are even.
Tensor balance_loss(const Routed& routed, const Tensor& mask) {
  const Tensor real = mask.reshape({-1}).to(torch::kFloat), tokens = real.sum().clamp_min(1);
  const Tensor choices =
      torch::zeros({kExperts}).scatter_add(0, routed.experts.reshape({-1}), real.repeat_interleave(kTopK));
  return kExperts * (choices / (kTopK * tokens)).dot(real.matmul(routed.shares) / tokens);
}

/// Routed experts in bfloat16 beside one that all tokens share.
struct MoeImpl : torch::nn::Module {
  MoeImpl(moectl::TorchController& controller, int at) : layer(at) {
    // moectl: the controller's tensor is the router's own buffer, and is saved with the model.
    router = register_module("router", Router(controller.bias(layer)));
    in = register_parameter("expert_in",
                            torch::randn({kExperts, kWidth, kHidden}) / std::sqrt(double{kWidth}));
    out = register_parameter("expert_out",
                             torch::randn({kExperts, kHidden, kWidth}) / std::sqrt(double{kHidden}));
    shared_in = register_module("shared_in", torch::nn::Linear(kWidth, kHidden));
    shared_out = register_module("shared_out", torch::nn::Linear(kHidden, kWidth));
  }

  Tensor forward(const Tensor& x, const Pass& pass) {
    const Tensor tokens = x.reshape({-1, kWidth});
    const Routed routed = route(tokens, pass);
    const std::vector<std::int64_t> shape = {x.size(0), x.size(1), kTopK};
    balance = balance_loss(routed, pass.mask);

    // moectl: what the router did, in any micro-batch. The mask keeps padding out of the counts. The number of the
    // micro-batch makes a recomputed forward pass count once.
    moectl::RecordOptions details{.mask = pass.mask, .micro_batch = pass.micro_batch};
    if (pass.mistake != "no-top-values") {
      details.top_values = routed.top_values;
      details.biased_scores = routed.biased_scores;
      details.scores = routed.scores;
    }
    if (pass.meter != nullptr) {
      pass.meter->record(layer, routed.experts.view(shape), details);
    } else {
      pass.controller->record(layer, routed.experts.view(shape), details);
    }

    Tensor mixed = shared_out(torch::silu(shared_in(tokens)));
    const Tensor half = tokens.to(torch::kBFloat16), half_in = in.to(torch::kBFloat16),
                 half_out = out.to(torch::kBFloat16);
    for (std::int64_t e = 0; e < kExperts; ++e) {
      const Tensor where = routed.experts.eq(e).nonzero();  // [assignments, 2]
      if (where.size(0) == 0) continue;
      const Tensor row = where.select(1, 0), slot = where.select(1, 1);
      const Tensor answer = torch::silu(half.index_select(0, row).mm(half_in[e])).mm(half_out[e]);
      const Tensor gate = routed.gates.index({row, slot}).unsqueeze(1);
      mixed = mixed.index_add(0, row, answer.to(torch::kFloat) * gate);
    }
    return x + mixed.view_as(x);
  }

  Routed route(const Tensor& tokens, const Pass& pass) {
    Tensor correction = router->bias, replayed;
    if (pass.mistake == "forget-bias") correction = torch::zeros_like(correction);
    if (pass.mistake == "wrong-sign") correction = -correction;
    if (pass.mistake == "wrong-layer") correction = pass.controller->bias((layer + 1) % int{kLayers});
    const bool replays = pass.mistake == "replayed-routes" && pass.micro_batch >= 0;
    if (replays) replayed = rollout[pass.micro_batch];
    const Routed routed = router->forward(tokens, correction, replayed);
    if (replays && !replayed.defined()) rollout[pass.micro_batch] = routed.experts;
    return routed;
  }

  int layer;
  Router router{nullptr};
  Tensor in, out;
  Tensor balance;  // of the last pass
  torch::nn::Linear shared_in{nullptr}, shared_out{nullptr};
  std::map<std::int64_t, Tensor> rollout;  // the mistake "replayed-routes": routes of an earlier pass
};
TORCH_MODULE(Moe);

struct ModelImpl : torch::nn::Module {
  explicit ModelImpl(moectl::TorchController& controller) {
    embedding = register_module("embedding", torch::nn::Embedding(kVocabulary, kWidth));
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::string at = std::to_string(layer);
      norms.push_back(register_module(
          "norm" + at, torch::nn::LayerNorm(torch::nn::LayerNormOptions(std::vector<std::int64_t>{kWidth}))));
      layers.push_back(register_module("moe" + at, Moe(controller, layer)));
    }
    head = register_module("head", torch::nn::Linear(kWidth, kVocabulary));
  }

  /// Mean loss of the real tokens; in training with the auxiliary losses.
  Tensor forward(const Batch& batch, const Pass& pass) {
    Tensor x = embedding(batch.tokens);
    x = x + 0.5 * torch::cat({torch::zeros_like(x.narrow(1, 0, 1)), x.narrow(1, 0, kLength - 1)}, 1);
    for (std::size_t l = 0; l < layers.size(); ++l) x = layers[l]->forward(norms[l](x), pass) + x;
    const Tensor losses = torch::nn::functional::cross_entropy(
        head(x).view({-1, kVocabulary}), batch.next.reshape(-1),
        torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kNone));
    Tensor loss = losses.masked_select(batch.mask.reshape(-1)).mean();
    // moectl: the weight that the controller holds.
    for (int l = 0; pass.meter == nullptr && l < kLayers; ++l)
      loss = loss + pass.controller->aux_loss_weight(l) * layers[static_cast<std::size_t>(l)]->balance;
    return loss;
  }

  torch::nn::Embedding embedding{nullptr};
  std::vector<torch::nn::LayerNorm> norms;
  std::vector<Moe> layers;
  torch::nn::Linear head{nullptr};
};
TORCH_MODULE(Model);

// ---- The training loop ----

moectl::ControllerConfig config_of(const Options& options, moectl::Mode mode) {
  moectl::ControllerConfig config;
  if (!options.text("--policy").empty()) {
    config = moectl::load_config(options.text("--policy"));
  } else {
    config.expert_bias.policy = "adaptive_bias";
    config.expert_bias.options.set("form", std::string("gap"));
  }
  // moectl: the config describes this model.
  config.model.layers = kLayers;
  config.model.experts = kExperts;
  config.model.top_k = kTopK;
  config.model.tokens_per_step = kMicroBatches * kSequences * kLength * 3 / 4;  // a quarter is padding
  config.model.score_space = moectl::ScoreSpace::kProbability;                  // the bias is added to σ(z)
  config.collect.sequences = true;  // the floor knows that tokens of a sequence are alike
  if (mode != moectl::Mode::kActive) config.mode = mode;
  return config;
}

/// Model, optimizer and controller: all that a checkpoint holds.
class Run {
 public:
  Run(const Options& options, moectl::Mode mode)
      : controller_(config_of(options, mode)), model_(controller_), meter_(controller_.controller()) {
    optimizer_ = std::make_unique<torch::optim::AdamW>(model_->parameters(),
                                                       torch::optim::AdamWOptions(3e-3).weight_decay(0.01));
  }

  void step(std::int64_t step, const Chains& chains, const std::string& mistake) {
    optimizer_->zero_grad();
    double loss = 0;
    for (std::int64_t part = 0; part < kMicroBatches; ++part) {
      const Batch batch = chains.draw();
      const Tensor one = model_->forward(
          batch, {.controller = &controller_, .mask = batch.mask, .micro_batch = part, .mistake = mistake});
      (one / double{kMicroBatches}).backward();
      loss += one.item<double>() / double{kMicroBatches};
    }
    // A batch now and then overflows, as happens in low precision.
    if (step % kOverflowEvery == kOverflowEvery - 1) model_->head->bias.mutable_grad().fill_(INFINITY);
    const double norm = torch::nn::utils::clip_grad_norm_(model_->parameters(), 1.0);
    const bool skipped = !std::isfinite(norm);
    if (!skipped) optimizer_->step();
    // moectl: once an optimizer step, also when the optimizer skipped it.
    controller_.step({.loss = loss, .gradient_norm = norm, .skipped = skipped});
  }

  /// Validation: under no-grad nothing is recorded, and the meter measures without moving the controller.
  double evaluate(std::int64_t step, const Chains& chains, moectl::RunLogWriter* log) {
    const torch::NoGradGuard no_grad;
    double loss = 0;
    meter_.clear();
    for (int part = 0; part < kMicroBatches; ++part) {
      const Batch batch = chains.draw();
      loss += model_->forward(batch, {.controller = &controller_, .meter = &meter_, .mask = batch.mask})
                  .item<double>() /
              double{kMicroBatches};
    }
    if (log != nullptr) log->write(meter_.report(step, {.loss = loss}), "validation");
    return loss;
  }

  void save(torch::serialize::OutputArchive& archive, std::int64_t step) {
    torch::serialize::OutputArchive model, optimizer;
    model_->save(model);
    optimizer_->save(optimizer);
    archive.write("model", model);
    archive.write("optimizer", optimizer);
    archive.write("step", torch::tensor(step));
    controller_.save(archive);  // moectl
  }
  std::int64_t load(torch::serialize::InputArchive& archive) {
    torch::serialize::InputArchive model, optimizer;
    archive.read("model", model);
    archive.read("optimizer", optimizer);
    model_->load(model);
    optimizer_->load(optimizer);
    controller_.load(archive);  // moectl: after the model, whose buffers it ties to the controller again
    Tensor step;
    archive.read("step", step);
    return step.item<std::int64_t>();
  }

  moectl::TorchController& controller() { return controller_; }
  Model& model() { return model_; }

 private:
  moectl::TorchController controller_;
  Model model_;
  moectl::EvaluationMeter meter_;
  std::unique_ptr<torch::optim::AdamW> optimizer_;
};

void train(const Options& options) {
  const std::int64_t steps = options.number("--steps"), seed = options.number("--seed");
  const std::string& mistake = options.text("--mistake");
  const Chains chains;
  torch::manual_seed(static_cast<std::uint64_t>(seed));
  const bool shadow = mistake == "shadow-then-active";
  auto run = std::make_unique<Run>(options, shadow ? moectl::Mode::kShadow : moectl::Mode::kActive);
  std::int64_t first = 0;
  if (!options.text("--resume").empty()) {
    torch::serialize::InputArchive archive;
    archive.load_from(options.text("--resume"));
    first = run->load(archive);
    torch::manual_seed(static_cast<std::uint64_t>(seed + 1000 * first));  // other batches
  }
  std::unique_ptr<moectl::RunLogWriter> log;
  if (!options.text("--log").empty()) {
    log = std::make_unique<moectl::RunLogWriter>(options.text("--log"),
                                                 run->controller().controller().config(), first > 0);
  }

  Listener listener;
  for (std::int64_t step = first; step < steps; ++step) {
    if (shadow && step == kSwitchToActive) {
      std::stringstream checkpoint;
      torch::serialize::OutputArchive out;
      run->save(out, step);
      out.save_to(checkpoint);
      run = std::make_unique<Run>(options, moectl::Mode::kActive);
      torch::serialize::InputArchive in;
      in.load_from(checkpoint);
      run->load(in);
    }
    if (mistake == "swap-storage" && step == 10) {  // the buffers get other storage
      std::stringstream file;
      torch::save(run->model(), file);
      torch::load(run->model(), file);
    }
    run->step(step, chains, step < options.number("--mend-at") ? mistake : "");
    const moectl::StepReport& report = run->controller().report();
    listener.hear(report);
    if (log) log->write(report);
    if ((step + 1) % 50 == 0) {
      const double validation = run->evaluate(step, chains, log.get());
      std::printf("step %3lld  loss %.3f  validation %.3f\n", static_cast<long long>(step),
                  report.info.loss.value_or(NAN), validation);
    }
  }
  print_balance(run->controller().report());
  if (!options.text("--save").empty()) {
    torch::serialize::OutputArchive archive;
    run->save(archive, steps);
    archive.save_to(options.text("--save"));
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    train(Options(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "your_router: %s\n", error.what());
    return 1;
  }
}
