// clang-format off
// SimulatedRouter: one MoE layer's router without a model. It closes the control loop in microseconds.
//
// THE MODEL. Time is counted in training steps; one call of route() is one step: a forward pass over T tokens, then
// what training does to the router.
//
//   tokens      A token belongs to a cluster c, drawn from the mixture of its domain d. With `sequence_length` > 0 the
//               tokens of a sequence share their domain, and a share `coherence` of them comes from three clusters of
//               that sequence: tokens of one sequence are alike, so the sampling floor lies above the noise floor, as
//               in text. With 0, tokens are independent, and so are their domains.
//   logits      z_ti = s (A_ci + σ n_ti) + h o_i. A: affinity of the cluster (a part shared by the clusters of a home
//               domain, and its own), an Ornstein–Uhlenbeck walk; n: standard noise; o: the router's preferences.
//               Early in training routers sharpen and preferences form: s goes from 0.5 to 1, h from 0.2 to 1, with
//               a time constant of `forming` = 300 steps.
//   gate        y = softmax(z/T) or sigmoid(z/T), T the temperature.
//   selection   the k largest of v = y + b (probability space) or v = z + b (logit space; T then acts in the gate
//               alone). `jitter` > 0 adds jitter · T · n' to z: only then does T move the load without a bias.
//   capacity    at most ⌈capacity_factor · kT/N⌉ assignments an expert; the rest is dropped (and trains nothing).
//   training    o += task_pull (w - o)                       the task wants its own preferences w back
//                  + rich (clip(N p_i, 0, 2) - 1)            the favoured learn faster: rich get richer
//                  - aux_pull · α · mean_t ∂L/∂z_ti          the auxiliary loss L = N Σ_i f_i P_i (Switch), exactly;
//               held inside ±12, as weight decay and z-loss do.
//
// SCENARIOS act from `event_step` on, except `delay` and the cold start of `collapse`, which act from the first step:
//   shift     the last domain, absent before, becomes half of the data         dead      experts sink by 6 logits
//   drift     affinities and preferences walk, 50 times faster                 delay     stats arrive `delay` steps late
//   noise     each step's mixture of domains is drawn anew, with jitter        collapse  see CollapseKind
//
// ASSUMPTIONS, and their limits. As in real routers, experts are selected by top-k of noisy linear scores. Unlike in
// real routers, affinities do not learn from the bias: real experts specialise in the tokens that they receive. The
// auxiliary gradient moves preferences only, so a strong weight cannot make routing less domain-specific here, as it
// does in training. There is no loss; the cost of balance is `displacement()`: the distance of the preferences from
// those that the task wants. Layers share their tokens and nothing else.
//
// THE CONSTANTS were fixed before any policy was tuned on it, against training runs of a byte-level language model
// (3 layers × 16 experts, top-2, sigmoid gate, 16 × 128 bytes a step, 700 steps). Simulated router, seeds 1–3 (training):
//   uncontrolled           MaxVio 3.6–6.0 (3.3), CV 1.3–1.8 (1.2)
//   sampling floor         MaxVio .38–.40 (.41): 3.5–3.7 × the noise floor (3.5–3.8)
//   auxiliary loss         1e-3: MaxVio 2.0–4.2 (1.8); 1e-2 settles in 170–325 steps (515–601), 1e-1 in 27–30 (89–106)
//   sign_bias              1e-3 settles in 138–194 steps (553–568), 1e-2 in 12–24 (76–82)
//   a domain switches on   MaxVio 1.1–2.0 at the first step (2.5), excess area under sign 1e-3 58–118 (170)
//   stability              integral control in units of the score gap goes unstable between gains 1 and 1.4 (0.7–1.4
//                          over seven router types)
// So the simulated router is as hard to balance as training, and settles two to four times faster, because a real router
// keeps learning against the controller. The walk is slower than in so short a training (a cluster forgets in 50 000
// steps), as in runs of that length.
//
// Every random number is a hash of (seed, layer, step, token), so a run depends only on its options: it has the
// same bits on every platform with IEEE floats, whatever ran before.
// clang-format on
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "moectl/stats.h"
#include "moectl/types.h"

namespace moectl {

class Controller;
struct ControllerConfig;
struct StepReport;

enum class SimulatedGate { kSoftmax, kSigmoid };
enum class Scenario { kSteady, kShift, kCollapse, kDead, kDrift, kDelay, kNoise };

/// The cause of the collapse in scenario `collapse`.
enum class CollapseKind {
  kRunaway,    ///< From the event on, rich-get-richer outruns the task's pull; a random expert has a head
               ///< start.
  kColdStart,  ///< From the first step on, one expert stands 6 logits above the rest, with the same lock-in.
  kDeadThird,  ///< A third of the experts (N ≥ 3) sinks by 6 logits, with the same lock-in.
  kPoisonedBias,  ///< The selection biases that the router uses are wrong by a fixed vector.
};

std::string_view name_of(SimulatedGate gate);
std::string_view name_of(Scenario scenario);
std::string_view name_of(CollapseKind kind);
std::optional<SimulatedGate> gate_of(std::string_view name);
std::optional<Scenario> scenario_of(std::string_view name);
std::optional<CollapseKind> collapse_of(std::string_view name);

struct SimulationOptions {
  // layers · kT and layers · N · clusters are at most 2^27: they fill memory.
  int layers = 1;              ///< 1 to 4096. Used by simulate(); a router is one layer.
  int experts = 16;            ///< N, 1 to 65535.
  int top_k = 2;               ///< 1 ≤ k ≤ N.
  std::int64_t tokens = 2048;  ///< T ≥ 1 a step; a multiple of sequence_length.
  SimulatedGate gate = SimulatedGate::kSigmoid;
  ScoreSpace score_space = ScoreSpace::kProbability;
  std::uint64_t seed = 1;

  Scenario scenario = Scenario::kSteady;
  std::int64_t event_step = 300;  ///< ≥ 0.
  CollapseKind collapse = CollapseKind::kRunaway;
  int sunk_experts = 1;  ///< `dead`: how many sink, < N.
  int delay = 0;  ///< Steps by which stats are late in simulate(), ≤ 65535; scenario `delay` wants ≥ 1.

  // Tokens. Spreads are at most 1000.
  std::int64_t sequence_length = 0;  ///< 0 = independent tokens.
  int domains = 4;                   ///< ≥ 1; `shift` wants ≥ 2.
  double mixture_spread = 0;    ///< Each step's mixture ∝ exp(spread · normal) a domain; 0 = constant.
  int clusters = 48;            ///< ≥ domains.
  double cluster_spread = 1.0;  ///< Standard deviation of affinities, logits.
  double domain_share = 0.8;    ///< Part of their variance common to the clusters of a domain, [0, 1].
  double token_spread = 1.0;    ///< σ, logits.
  double coherence = 0.55;      ///< [0, 1].

  // Router.
  double preference = 1.0;  ///< Standard deviation of w over experts, logits, ≤ 1000.
  double jitter = 0;        ///< 0 to 1000.
  double score_scale = 1;   ///< 1e-6 to 1e6. Factor on the scores that biases add to: the unit of the bias.
  double capacity_factor = 0;  ///< 0 = dropless.
  bool probabilities = false;  ///< Hand out the router's probabilities (softmax, or sigmoids over their sum).
  /// Hand out all the scores that selection compared, for margins. None if k = N.
  bool biased_scores = false;

  // Training.
  double forming = 300;  ///< Steps over which the router sharpens; 0 = formed from the first on.
  double task_pull = 6e-4;
  double rich = 3e-4;
  double aux_pull = 40;
  double affinity_walk = 2e-5;  ///< Variance share of A renewed a step.

  /// Target share of the load of each expert [N]; empty = equal. The router does not know the targets; events strike
  /// experts whose target is at least the mean.
  std::vector<double> targets{};
};

class SimulatedRouter {
 public:
  /// Throws std::invalid_argument naming the option that is out of range.
  explicit SimulatedRouter(const SimulationOptions& options, int layer = 0);
  ~SimulatedRouter();
  /// A copy is independent: routing through it does not change the original.
  SimulatedRouter(const SimulatedRouter&);
  SimulatedRouter& operator=(const SimulatedRouter&);
  SimulatedRouter(SimulatedRouter&&) noexcept;
  SimulatedRouter& operator=(SimulatedRouter&&) noexcept;

  /// One step: routes the next batch under these actuators, then lets training act on the router. The views
  /// (chosen experts, top k+1 scores, sequence length, domains, drops) are valid until the next call. Does
  /// not allocate after the first. Throws std::invalid_argument unless bias is [N] and all values are finite,
  /// aux_loss_weight ≥ 0 and temperature > 0.
  RoutingBatch route(std::span<const double> bias, double aux_loss_weight = 0, double temperature = 1);

  /// Tokens per domain of the batch that the next route() will draw, as a data loader knows them. [domains]
  std::span<const std::int64_t> next_mixture();

  std::int64_t step() const;  ///< Batches routed so far.
  const SimulationOptions& options() const;
  /// The router's preferences o and those that the task wants, w. [N], logits.
  std::span<const double> preferences() const;
  std::span<const double> wanted_preferences() const;
  /// Mean over experts of ((o_i - ō) - (w_i - w̄))², logits²: what balancing by auxiliary loss has cost the task.
  double displacement() const;
  /// Changes T from the next batch on (a fault: batches 10 times as large). A multiple of sequence_length.
  void set_tokens(std::int64_t tokens);

 private:
  struct Plant;
  std::unique_ptr<Plant> plant_;
};

/// The simulated model that a config describes: its layers, experts, top_k, tokens, score space, delay and domains. All
/// other options, and tokens or domains if the config has none, are taken from `otherwise`.
SimulationOptions simulation_options(const ControllerConfig& config, const SimulationOptions& otherwise = {});

/// Closes the loop. In each of `steps` steps: routes every layer under the controller's values in force, records the
/// routing (`delay` steps late), and calls Controller::step. `observe`, if given, receives every report.
void simulate(Controller& controller, const SimulationOptions& options, std::int64_t steps,
              const std::function<void(const StepReport&)>& observe = {});

}  // namespace moectl
