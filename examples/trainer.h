// Training: the main job. One process, or one of several that share every batch.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "corpus.h"
#include "moe_model.h"
#include "moectl/controller.h"
#include "moectl/run_log.h"
#include "moectl/torch/controller.h"
#include "moectl/torch/evaluation.h"
#include "progress.h"

namespace CLI {
class App;
}

struct Arguments {
  std::vector<std::string> text;
  std::string policy, log, checkpoint, resume, resume_controller = "all";
  std::int64_t steps = 600, until = 0, seed = 1, checkpoint_every = 0, validate_every = 100;
  int stages = 1;
  std::int64_t sequences = 16, length = 128;
  std::int64_t width = 96, heads = 4, expert_hidden = 96;
  std::string device = "cpu", gate = "sigmoid";
  int threads = 2;
  bool quiet = false, bf16 = false;
  double learning_rate = 3e-3, shift_at = 0.6, router_init = 1;
  std::string fault;  // and the step before which it comes
  std::int64_t fault_at = 0;

  void declare(CLI::App& app);
};

/// The other processes of a data-parallel run; none by default.
struct Peers {
  int rank = 0, ranks = 1;
  moectl::Reduction sum_counts{};             // for the controller
  std::function<void(torch::Tensor&)> sum{};  // in place, over all ranks
};

class Training {
 public:
  explicit Training(const Arguments& arguments, Peers peers = {});
  void run();
  /// The controller's whole state, as it is on this rank.
  std::string controller_state() const { return stages_.front()->save(); }

 private:
  std::vector<double> mixture(std::int64_t step) const;
  std::pair<torch::Tensor, torch::Tensor> tensors(const Batch& batch) const;
  torch::Tensor forward(const torch::Tensor& bytes, Pass& pass);
  void train(std::int64_t step);
  void observe_losses(const Pass& pass, const torch::Tensor& losses);
  void observe_gradients();
  std::string specialists(const moectl::LayerReport& layer) const;
  std::vector<double> evaluate(bool deployed);
  void validate(std::int64_t step);
  void make_stages();
  void log_steps();
  Batch batch_of(std::int64_t step) const;
  void sum_gradients();
  void announce();
  std::string live_line() const;
  void save(std::int64_t step);
  std::int64_t load();
  void load_controller(torch::serialize::InputArchive& archive);
  bool times_experts() const;

  Arguments args_;
  Peers peers_;
  torch::Device device_;
  std::vector<Domain> domains_;
  std::int64_t shift_step_;
  /// One holds all layers, or each some of them, as the stages of a pipeline do.
  std::vector<std::unique_ptr<moectl::TorchController>> stages_;
  std::vector<moectl::TorchController*> controllers_;  // of each block; null where it is dense
  moectl::ControllerConfig config_;                    // of all layers
  std::unique_ptr<moectl::EvaluationMeter> meter_;
  MoeLm model_{nullptr};
  std::unique_ptr<torch::optim::AdamW> optimizer_;
  std::unique_ptr<moectl::RunLogWriter> log_;
  std::unique_ptr<Progress> progress_;
  std::vector<std::int64_t> next_mixture_;
  Batch next_;
  std::optional<double> validation_loss_;
  double loss_ = 0, train_seconds_ = 0, control_seconds_ = 0;
};

/// Call first in main: starts the program again, once, with waiting threads asleep.
void restart_with_passive_threads(char** argv);
/// Threads of LibTorch and of OpenBLAS.
void set_up_threads(int threads);
