#include "trainer.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "autocast.h"
#include "faults.h"
#include "moectl/config.h"
#include "moectl/run_log.h"
#include "moectl/state_file.h"
#include "moectl/torch/controller.h"
#include "moectl/torch/evaluation.h"
#include "moectl/torch/observations.h"

// OpenBLAS has its own threads beside LibTorch's. Absent with another BLAS.
extern "C" __attribute__((weak)) void openblas_set_num_threads(int);

namespace {

using torch::Tensor;
using Clock = std::chrono::steady_clock;

// Norms of the experts' gradients take as long as all the rest of the control, so not at every step.
constexpr std::int64_t kGradientEvery = 10;
constexpr std::int64_t kValidationSequences = 64;  // of each domain

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

template <typename... Values>
std::string format(const char* pattern, Values... values) {
  char text[256];
  std::snprintf(text, sizeof text, pattern, values...);
  return text;
}

/// Blocks from 0 to the last layer of the config; those that it does not name are dense.
std::vector<MoeShape> blocks_of(const moectl::ControllerConfig& config) {
  std::vector<MoeShape> blocks;
  for (const moectl::LayerSettings& group : moectl::layer_settings(config)) {
    const moectl::ModelConfig& model = group.config.model;
    for (const int layer : group.ids) {
      blocks.resize(std::max(blocks.size(), static_cast<std::size_t>(layer) + 1));
      blocks[static_cast<std::size_t>(layer)] = {model.experts, model.top_k, model.score_space};
    }
  }
  return blocks;
}

/// The mean over layers, and that of its floor for these tokens.
std::string global_vio(const moectl::StepReport& report) {
  double vio = 0, floor = 0;
  const auto layers = static_cast<double>(report.layers.size());
  for (const moectl::LayerReport& layer : report.layers) {
    vio += layer.metrics->max_vio.value_or(0) / layers;
    floor += moectl::floor_of(*layer.metrics).max_vio.value_or(0) / layers;
  }
  return format("%.3f (floor %.3f)", vio, floor);
}

/// A config that leaves the router alone, with the sums that show the gap between load and floor.
moectl::ControllerConfig uncontrolled() {
  moectl::ControllerConfig config;
  config.model.layers = 3;
  config.model.experts = 16;
  config.model.top_k = 2;
  return config;
}

torch::Device usable_device(const std::string& name) {
  try {
    const torch::Device device(name);
    if (device.is_cuda() && !torch::cuda::is_available())
      throw std::runtime_error("--device " + name + ": LibTorch sees no GPU");
    torch::zeros({1}, device);
    return device;
  } catch (const c10::Error& error) {
    const std::string why = error.what_without_backtrace();
    throw std::runtime_error("--device " + name + ": " + why.substr(0, why.find('\n')));
  }
}

}  // namespace

void Arguments::declare(CLI::App& app) {
  app.option_defaults()->always_capture_default();
  app.add_option("--text", text,
                 "Text files, each a domain; the last switches on at 60 % (default: this machine's own)");
  app.add_option("--policy", policy,
                 "Controller config; its model section sizes the model (default: uncontrolled)");
  app.add_option("--steps", steps, "Optimizer steps of the whole run")->check(CLI::Range(1, 100000000));
  app.add_option("--until", until, "Stop before this step, to be resumed later (0 = run to the end)");
  app.add_option("--seed", seed, "Of the initial weights and the batches");
  app.add_option("--threads", threads, "CPU threads")->check(CLI::Range(1, 1024));
  app.add_option("--batch", sequences, "Sequences in a batch")->check(CLI::Range(1, 65536));
  app.add_option("--length", length, "Bytes in a sequence")->check(CLI::Range(2, 65536));
  app.add_option("--width", width, "Of a token's vector; a multiple of --heads")->check(CLI::Range(1, 65536));
  app.add_option("--heads", heads, "Attention heads")->check(CLI::Range(1, 1024));
  app.add_option("--expert-hidden", expert_hidden, "Width inside each expert")->check(CLI::Range(1, 1 << 20));
  app.add_option("--gate", gate, "Of the routers")->check(CLI::IsMember({"sigmoid", "softmax"}));
  app.add_option("--device", device, "Where the model computes: cpu, cuda or cuda:N");
  app.add_flag("--bf16", bf16, "Matrix products in bfloat16 (autocast)");
  app.add_option("--learning-rate", learning_rate, "Peak learning rate")->check(CLI::PositiveNumber);
  app.add_option("--router-init", router_init, "Factor on the initial weights of the routers")
      ->check(CLI::PositiveNumber);
  app.add_option("--fault", fault, "Break the routers in mid-training")
      ->check(CLI::IsMember(std::vector<std::string>(kFaults.begin(), kFaults.end())));
  app.add_option("--fault-at", fault_at, "Step before which --fault comes")->check(CLI::Range(0, 100000000));
  app.add_option("--validate-every", validate_every, "Steps between validation passes")
      ->check(CLI::Range(1, 100000000));
  app.add_option("--log", log, "Run log to write (JSON lines)");
  app.add_flag("--quiet", quiet, "Say results alone: `moectl watch` shows how the run goes");
  app.add_option("--stages", stages, "Controllers that share the layers, as the stages of a pipeline do")
      ->check(CLI::Range(1, 1024));
  app.add_option("--checkpoint", checkpoint, "Checkpoint to write at the end, or every so many steps");
  app.add_option("--checkpoint-every", checkpoint_every, "Steps between checkpoints (0 = at the end only)");
  app.add_option("--resume", resume, "Checkpoint to continue from");
  app.add_option("--resume-controller", resume_controller,
                 "What of its controller to go on with: all, what-fits of another --policy, or none")
      ->check(CLI::IsMember({"all", "what-fits", "none"}));
}

Training::Training(const Arguments& arguments, Peers peers)
    : args_(arguments), peers_(std::move(peers)), device_(usable_device(arguments.device)) {
  if (peers_.ranks > 1 && !device_.is_cpu())
    throw std::runtime_error("--device: several processes share the CPU alone");
  if (args_.width % args_.heads != 0) throw std::runtime_error("--width: must be a multiple of --heads");
  domains_ = args_.text.empty() ? system_domains() : file_domains(args_.text);
  shift_step_ = domains_.size() > 1
                    ? static_cast<std::int64_t>(args_.shift_at * static_cast<double>(args_.steps))
                    : args_.steps;

  moectl::ControllerConfig config = args_.policy.empty() ? uncontrolled() : moectl::load_config(args_.policy);
  config.model.tokens_per_step = args_.sequences * args_.length;
  config.model.domains.clear();
  for (const Domain& domain : domains_) config.model.domains.push_back(domain.name);
  config.collect.sequences = true;
  // What is known of single experts waits for an accelerator.
  config.collect.gradients = config.collect.losses = config.collect.domain_losses = device_.is_cpu();
  config_ = config;
  make_stages();
  const ModelOptions size{.blocks = blocks_of(config),
                          .width = args_.width,
                          .heads = args_.heads,
                          .expert_hidden = args_.expert_hidden,
                          .context = args_.length,
                          .gate = args_.gate == "softmax" ? moectl::Gate::kSoftmax : moectl::Gate::kSigmoid};
  if (peers_.ranks > 1) stages_.front()->controller().set_reduction(peers_.sum_counts);
  meter_ = std::make_unique<moectl::EvaluationMeter>(moectl::Controller(config));

  torch::manual_seed(static_cast<std::uint64_t>(args_.seed));
  model_ = MoeLm(size);
  scale_routers(model_, args_.router_init);
  model_->to(device_);
  optimizer_ = std::make_unique<torch::optim::AdamW>(
      model_->parameters(),
      torch::optim::AdamWOptions(args_.learning_rate).betas({0.9, 0.95}).weight_decay(0.01));
  next_mixture_.resize(domains_.size());
}

/// Divides the layers of experts evenly, in their order.
void Training::make_stages() {
  const std::vector<int> layers = moectl::Controller(config_).layers();
  if (args_.stages > static_cast<int>(layers.size()))
    throw std::runtime_error("--stages: must be at most the number of layers of experts");
  if (args_.stages > 1 && (!config_.layers.empty() || peers_.ranks > 1 || !args_.checkpoint.empty()))
    throw std::runtime_error("--stages: not with layer groups, several processes or --checkpoint");
  const moectl::TorchOptions options{.device = device_};
  const auto count = static_cast<std::size_t>(args_.stages);
  for (std::size_t s = 0; s < count; ++s) {
    moectl::ControllerConfig own = config_;
    if (count > 1) {
      const auto at = [&](std::size_t i) {
        return layers.begin() + static_cast<std::ptrdiff_t>(layers.size() * i / count);
      };
      own.layers.resize(1);
      own.layers[0].ids = {at(s), at(s + 1)};
      own.model.layers = static_cast<int>(own.layers[0].ids.size());
    }
    stages_.push_back(std::make_unique<moectl::TorchController>(own, options));
    for (const int layer : stages_.back()->controller().layers()) {
      controllers_.resize(std::max(controllers_.size(), static_cast<std::size_t>(layer) + 1));
      controllers_[static_cast<std::size_t>(layer)] = stages_.back().get();
    }
  }
}

/// One record of a step for all stages.
void Training::log_steps() {
  auto joined = std::make_shared<std::pair<std::vector<moectl::LayerReport>, std::vector<moectl::Notice>>>();
  for (const auto& stage : stages_) {
    stage->controller().set_log(
        [this, joined, last = stage == stages_.back()](const moectl::StepReport& report) {
          auto& [layers, notices] = *joined;
          layers.insert(layers.end(), report.layers.begin(), report.layers.end());
          notices.insert(notices.end(), report.notices.begin(), report.notices.end());
          if (!last) return;
          moectl::StepReport all = report;
          all.layers = layers;
          all.notices = notices;
          log_->write(all);
          layers.clear();
          notices.clear();
        });
  }
}

/// Before the shift all domains but the last, evenly; after it the last is half of every batch.
std::vector<double> Training::mixture(std::int64_t step) const {
  const std::size_t others = domains_.size() - 1;
  if (others == 0) return {1.0};
  const double last = step < shift_step_ ? 0.0 : 0.5;
  std::vector<double> shares(others, (1 - last) / static_cast<double>(others));
  shares.push_back(last);
  return shares;
}

/// Bytes [B, S+1] and the domain of each token [B, S], on the device.
std::pair<Tensor, Tensor> Training::tensors(const Batch& batch) const {
  const Tensor bytes = torch::tensor(batch.bytes).view({batch.sequences, batch.length + 1});
  const Tensor domains = torch::tensor(batch.domains).unsqueeze(1).expand({-1, batch.length}).contiguous();
  return {bytes.to(device_), domains.to(device_)};
}

/// This rank's part of the step's batch: neighbouring sequences, as even a share as there is.
Batch Training::batch_of(std::int64_t step) const {
  Batch all = training_batch(domains_, mixture(step), static_cast<std::uint64_t>(args_.seed), step,
                             args_.sequences, args_.length);
  const std::int64_t first = all.sequences * peers_.rank / peers_.ranks;
  const std::int64_t last = all.sequences * (peers_.rank + 1) / peers_.ranks;
  all.bytes = {all.bytes.begin() + first * (all.length + 1), all.bytes.begin() + last * (all.length + 1)};
  all.domains = {all.domains.begin() + first, all.domains.begin() + last};
  all.sequences = last - first;
  return all;
}

/// One all-reduce for all parameters. A parameter that no token of this rank reached has no gradient yet.
void Training::sum_gradients() {
  std::vector<Tensor> flat;
  const std::vector<Tensor> parameters = model_->parameters();
  for (const Tensor& parameter : parameters) {
    const Tensor& gradient = parameter.grad();
    flat.push_back(gradient.defined() ? gradient.flatten() : torch::zeros({parameter.numel()}));
  }
  Tensor all = torch::cat(flat);
  peers_.sum(all);
  std::int64_t offset = 0;
  for (Tensor parameter : parameters) {
    parameter.mutable_grad() = all.narrow(0, offset, parameter.numel()).view_as(parameter).clone();
    offset += parameter.numel();
  }
}

/// Logits [B, S, 256] in float32 for all bytes but the last of each sequence.
Tensor Training::forward(const Tensor& bytes, Pass& pass) {
  const Autocast half(device_.type(), args_.bf16);
  return model_->forward(bytes.narrow(1, 0, args_.length), pass).to(torch::kFloat32);
}

bool Training::times_experts() const {
  const moectl::Controller& controller = stages_.front()->controller();
  return device_.is_cpu() && controller.shape(controller.layers().front()).needs.latencies;
}

void Training::train(std::int64_t step) {
  const auto start = Clock::now();
  const double warm_up = std::min(1.0, static_cast<double>(step + 1) / 30);
  const double done = static_cast<double>(step) / static_cast<double>(args_.steps);
  const double rate = args_.learning_rate * warm_up * (0.55 + 0.45 * std::cos(done * 3.14159265358979));
  static_cast<torch::optim::AdamWOptions&>(optimizer_->param_groups()[0].options()).lr(rate);

  const auto [bytes, domain_ids] = tensors(next_);
  Pass pass{.controllers = controllers_, .domain_ids = domain_ids, .time_experts = times_experts()};
  const Tensor logits = forward(bytes, pass);
  const Tensor targets = bytes.narrow(1, 1, args_.length).reshape(-1);
  const Tensor log_probabilities = logits.view({-1, 256}).log_softmax(1);
  const Tensor loss = torch::nll_loss(log_probabilities, targets);
  if (device_.is_cpu())
    observe_losses(pass, log_probabilities.detach().gather(1, targets.unsqueeze(1)).neg());
  optimizer_->zero_grad();
  if (peers_.ranks == 1) {
    (loss + pass.aux_loss).backward();
  } else {
    // Means over each rank's own tokens, weighted by its share of the batch, add up to the mean over the
    // batch.
    const double share = static_cast<double>(next_.sequences) / static_cast<double>(args_.sequences);
    ((loss + pass.aux_loss) * share).backward();
    sum_gradients();
  }
  if (device_.is_cpu() && step % kGradientEvery == 0) observe_gradients();
  const double norm = torch::nn::utils::clip_grad_norm_(model_->parameters(), 1.0);
  optimizer_->step();

  next_ = batch_of(step + 1);
  std::fill(next_mixture_.begin(), next_mixture_.end(), 0);
  for (const std::int64_t domain : next_.domains)
    next_mixture_[static_cast<std::size_t>(domain)] += args_.length;

  const auto control = Clock::now();
  loss_ = loss.item<double>();
  for (const auto& stage : stages_) {
    stage->step({.loss = loss_, .gradient_norm = norm, .next_mixture = next_mixture_});
  }
  control_seconds_ += pass.control_seconds + seconds_since(control);
  train_seconds_ += seconds_since(start);
}

/// What the experts' own tokens cost, and how long the experts took.
void Training::observe_losses(const Pass& pass, const Tensor& losses) {
  const auto start = Clock::now();
  for (const Routed& layer : pass.routed) {
    moectl::TorchController& controller = *controllers_[static_cast<std::size_t>(layer.layer)];
    moectl::record_losses(controller, layer.layer, layer.indices, losses, {.domain_ids = pass.domain_ids});
    if (layer.latencies.empty()) continue;
    controller.controller().record_with(
        layer.layer, [&](moectl::RoutingStats& sums) { sums.add_latencies(layer.latencies); });
  }
  control_seconds_ += seconds_since(start);
}

void Training::observe_gradients() {
  const auto start = Clock::now();
  for (const auto& [layer, parameters] : model_->expert_parameters()) {
    moectl::record_gradients(*controllers_[static_cast<std::size_t>(layer)], layer, parameters);
  }
  control_seconds_ += seconds_since(start);
}

/// The experts that serve each domain most, with their share of its tokens' choices.
std::string Training::specialists(const moectl::LayerReport& layer) const {
  std::string line = format("layer %d", layer.layer);
  for (std::size_t d = 0; d < domains_.size(); ++d) {
    const auto counts = layer.stats->domain_counts(static_cast<int>(d));
    std::vector<std::size_t> experts(counts.size());
    std::iota(experts.begin(), experts.end(), std::size_t{0});
    std::stable_sort(experts.begin(), experts.end(),
                     [&](std::size_t a, std::size_t b) { return counts[a] > counts[b]; });
    const auto total =
        std::max<std::int64_t>(1, std::accumulate(counts.begin(), counts.end(), std::int64_t{0}));
    line += "  " + domains_[d].name + ":";
    for (std::size_t i = 0; i < std::min<std::size_t>(3, experts.size()); ++i) {
      line += format(" %zu (%.0f %%)", experts[i],
                     100.0 * static_cast<double>(counts[experts[i]]) / static_cast<double>(total));
    }
  }
  return line;
}

/// The validation set's loss in each domain; the meter has the loads of the pass.
std::vector<double> Training::evaluate(bool deployed) {
  const torch::NoGradGuard no_grad;
  const Batch held_out = validation_set(domains_, kValidationSequences, args_.length);
  const auto [bytes, domain_ids] = tensors(held_out);
  std::vector<double> losses(domains_.size(), 0.0);
  meter_->clear();
  for (std::int64_t first = 0; first < held_out.sequences; first += args_.sequences) {
    const std::int64_t count = std::min(args_.sequences, held_out.sequences - first);
    const Tensor part = bytes.narrow(0, first, count);
    Pass pass{.controllers = controllers_,
              .meter = meter_.get(),
              .deployed = deployed,
              .domain_ids = domain_ids.narrow(0, first, count)};
    const Tensor logits = forward(part, pass);
    const Tensor each = torch::nn::functional::cross_entropy(
                            logits.transpose(1, 2), part.narrow(1, 1, args_.length),
                            torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kNone))
                            .mean(1);
    for (std::int64_t i = 0; i < count; ++i) {
      losses[static_cast<std::size_t>(held_out.domains[static_cast<std::size_t>(first + i)])] +=
          each[i].item<double>() / kValidationSequences;
    }
  }
  return losses;
}

/// With the biases to deploy: those in force hold the feed-forward of the next batch.
void Training::validate(std::int64_t step) {
  const bool last = step + 1 == args_.steps;
  if (last) {
    evaluate(/*deployed=*/false);
    const moectl::StepReport& in_force = meter_->report(step);
    if (log_ != nullptr) log_->write(in_force, "in_force");
    progress_->note("with the biases in force: MaxVio_global " + global_vio(in_force));
  }
  const std::vector<double> losses = evaluate(/*deployed=*/true);
  double mean = 0;
  std::string line;
  for (std::size_t d = 0; d < domains_.size(); ++d) {
    mean += losses[d] / static_cast<double>(domains_.size());
    line += format("  %s %.3f", domains_[d].name.c_str(), losses[d]);
  }
  validation_loss_ = mean;
  const moectl::StepReport& report = meter_->report(step, {.loss = mean});
  if (log_ != nullptr) log_->write(report, "validation");
  progress_->note(format("validation after step %lld: loss %.4f  MaxVio_global ",
                         static_cast<long long>(step + 1), mean) +
                  global_vio(report) + line);
  if (!last) return;
  progress_->note("experts that serve each domain most, and their share of it:");
  for (const moectl::LayerReport& layer : report.layers) progress_->note(specialists(layer));
}

std::string Training::live_line() const {
  double vio = 0, floor = 0, cv = 0, dead = 0, aux = 0;
  std::vector<moectl::LayerReport> layers;
  for (const auto& stage : stages_) {
    layers.insert(layers.end(), stage->report().layers.begin(), stage->report().layers.end());
  }
  if (layers.empty()) return format("loss %.3f", loss_);  // mode: off
  for (const moectl::LayerReport& layer : layers) {
    vio += layer.metrics->max_vio.value_or(0);
    floor += moectl::floor_of(*layer.metrics).max_vio.value_or(0);
    cv += layer.metrics->load_cv.value_or(0);
    dead += layer.metrics->dead_experts.value_or(0);
    aux += controllers_[static_cast<std::size_t>(layer.layer)]->controller().aux_loss_weight(layer.layer);
  }
  const auto n = static_cast<double>(layers.size());
  return format("loss %.3f  MaxVio %.3f (floor %.3f)  CV %.3f  dead %.0f  aux weight %.4f", loss_, vio / n,
                floor / n, cv / n, dead, aux / n);
}

void Training::save(std::int64_t step) {
  if (log_ != nullptr) log_->flush();
  torch::serialize::OutputArchive archive, model, optimizer;
  model_->save(model);
  optimizer_->save(optimizer);
  archive.write("model", model);
  archive.write("optimizer", optimizer);
  stages_.front()->save(archive);
  archive.write("step", torch::tensor(step));
  const auto log_size =
      args_.log.empty() ? 0 : static_cast<std::int64_t>(std::filesystem::file_size(args_.log));
  archive.write("log_size", torch::tensor(log_size));
  archive.write("losses", torch::tensor({loss_, validation_loss_.value_or(NAN)}, torch::kFloat64));
  std::ostringstream bytes;
  archive.save_to(bytes);
  // A run killed while it writes leaves the checkpoint before intact.
  moectl::write_file_atomically(args_.checkpoint, bytes.str());
}

void Training::load_controller(torch::serialize::InputArchive& archive) {
  const bool all = args_.resume_controller == "all";
  const bool one = stages_.size() == 1;
  moectl::TorchController whole(config_);
  moectl::TorchController& to = one ? *stages_.front() : whole;
  const auto parts = to.load(archive, "moectl", all ? moectl::Keep::everything : moectl::Keep::what_fits);
  for (std::size_t layer = 0; layer < controllers_.size() && !one; ++layer) {
    if (controllers_[layer] == nullptr) continue;
    const int id = static_cast<int>(layer);
    controllers_[layer]->load_layer(id, whole.save_layer(id));
  }
  for (const moectl::KeptPart& part : parts) {
    if (part.fate == moectl::KeptPart::Fate::kKept) continue;
    const std::string where = part.layer < 0 ? "" : "layer " + std::to_string(part.layer) + ": ";
    if (progress_)
      progress_->note("controller: " + where + part.key + ": " + std::string(name_of(part.fate)) + ": " +
                      part.why);
  }
}

/// Returns the step to continue with. The log loses what was written after the checkpoint: those steps come
/// again.
std::int64_t Training::load() {
  torch::serialize::InputArchive archive, model, optimizer;
  archive.load_from(args_.resume);
  archive.read("model", model);
  archive.read("optimizer", optimizer);
  model_->load(model);
  optimizer_->load(optimizer);
  Tensor step, log_size, losses;
  archive.read("step", step);
  if (args_.resume_controller == "none") {  // the config says what it begins with
    for (const auto& stage : stages_) stage->controller().begin_at(step.item<std::int64_t>());
  } else {
    load_controller(archive);
  }
  archive.read("log_size", log_size);
  archive.read("losses", losses);
  loss_ = losses[0].item<double>();
  if (const auto validation = losses[1].item<double>(); !std::isnan(validation))
    validation_loss_ = validation;
  if (!args_.log.empty() && peers_.rank == 0) {
    const auto size = static_cast<std::uintmax_t>(log_size.item<std::int64_t>());
    if (!std::filesystem::exists(args_.log) || std::filesystem::file_size(args_.log) < size) {
      throw std::runtime_error(args_.log + ": is not the log that the checkpoint goes on with");
    }
    std::filesystem::resize_file(args_.log, size);
  }
  return step.item<std::int64_t>();
}

void Training::announce() {
  progress_ = std::make_unique<Progress>(
      args_.policy.empty() ? "uncontrolled" : std::filesystem::path(args_.policy).stem().string(),
      args_.steps);
  std::string names;
  for (const Domain& domain : domains_)
    names += format(" %s (%zu kB)", domain.name.c_str(), domain.train.size() / 1000);
  progress_->note("text:" + names +
                  (domains_.size() > 1 ? ", the last from step " + std::to_string(shift_step_) : ""));
}

void Training::run() {
  const bool first_rank = peers_.rank == 0;
  if (first_rank) announce();
  const std::int64_t first = args_.resume.empty() ? 0 : load();
  const std::int64_t end = args_.until > 0 ? std::min(args_.until, args_.steps) : args_.steps;
  if (!args_.log.empty() && first_rank) {
    const auto shift = domains_.size() > 1 ? std::optional(shift_step_) : std::nullopt;
    log_ = std::make_unique<moectl::RunLogWriter>(args_.log, moectl::Controller(config_).config(), first > 0,
                                                  shift);
    log_steps();
  }

  next_ = batch_of(first);
  for (std::int64_t step = first; step < end; ++step) {
    if (!args_.fault.empty() && step == args_.fault_at) break_routers(model_, controllers_, args_.fault);
    train(step);
    if (!first_rank) continue;
    if (!args_.quiet) progress_->show(step + 1, live_line());
    if ((step + 1) % args_.validate_every == 0 || step + 1 == args_.steps) validate(step);
    const bool due = args_.checkpoint_every > 0 && (step + 1) % args_.checkpoint_every == 0;
    if (!args_.checkpoint.empty() && (due || step + 1 == end)) save(step + 1);
  }
  if (!first_rank) return;
  const auto steps = static_cast<double>(std::max<std::int64_t>(1, end - first));
  std::printf("final loss %.9f\n", loss_);
  if (validation_loss_) std::printf("validation loss %.4f\n", *validation_loss_);
  std::printf("%.1f ms a step; control %.3f ms, %.2f %% of training time\n", 1e3 * train_seconds_ / steps,
              1e3 * control_seconds_ / steps, 100 * control_seconds_ / train_seconds_);
}

void restart_with_passive_threads(char** argv) {
  // OpenMP's threads spin while they wait. On a machine that has other work to do, steps then take ten times
  // as long; asleep they cost nothing. The runtime reads its settings before main, so they need a start of
  // their own.
  if (setenv("OMP_WAIT_POLICY", "passive", /*overwrite=*/0) == 0 &&
      std::getenv("MOECTL_RESTARTED") == nullptr) {
    setenv("MOECTL_RESTARTED", "1", 1);
    execv("/proc/self/exe", argv);
  }
}

void set_up_threads(int threads) {
  torch::set_num_threads(threads);
  if (openblas_set_num_threads != nullptr) openblas_set_num_threads(threads);
}
