#include "moectl/simulation.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "simulation/simulation_options.h"
#include "simulation/simulation_random.h"

namespace moectl {
namespace {

using simulated::AliasTable;
using simulated::hash;
using simulated::normal;
using simulated::quick_exp;

constexpr int kTopics = 3;                 // clusters of one sequence
constexpr double kOffsetLimit = 12;        // logits; what weight decay and z-loss allow
constexpr double kSink = 6;                // logits
constexpr double kLockIn = 30;             // factor on `rich` in a collapse
constexpr double kDriftFactor = 50;        // scenario drift
constexpr double kForeignWeight = 0.05;    // a cluster's weight in domains that are not its home
constexpr std::size_t kNoiseRows = 65536;  // places in the noise table at which a token's row may start
constexpr std::size_t kLane = 8;           // rows are padded to this, so that loops over experts vectorise

// Purposes of random numbers: each stream is hash(hash(seed, purpose, layer or step), index).
enum class Stream : std::uint64_t {
  kNoise = 1,
  kAffinity,
  kPreference,
  kMixture,
  kDomain,
  kToken,
  kTopic,
  kWeight,
  kWalk
};

std::size_t index_of(std::int64_t value) {
  return static_cast<std::size_t>(value);
}

}  // namespace

struct SimulatedRouter::Plant {
  Plant(const SimulationOptions& given, int which_layer);

  std::uint64_t stream(Stream purpose, std::uint64_t index) const {
    return hash(hash(options.seed, static_cast<std::uint64_t>(purpose)), index);
  }
  bool after_event() const { return step >= options.event_step; }
  bool in_collapse(CollapseKind kind) const {
    return options.scenario == Scenario::kCollapse && options.collapse == kind;
  }
  void resize_batch(std::int64_t tokens);
  void draw_mixture(std::int64_t at);
  void draw_domains(std::int64_t at);
  void strike();
  void route_tokens(double temperature, bool keep_probabilities);
  void gate_row(const float* logits, float* out, float temperature) const;
  void select(const float* biased, std::int64_t* chosen_row, float* top);
  void drop_overflow();
  void pull_by_aux_loss(double weight, double temperature);
  void train();
  void walk();

  SimulationOptions options;
  int layer;
  std::size_t experts, stride, k, domains, clusters;
  std::int64_t step = 0;

  // What is drawn once.
  std::vector<float> noise;    // [kNoiseRows + stride], standard normal; a token's row starts anywhere
  std::vector<double> wanted;  // w [N]
  std::vector<AliasTable> clusters_of_domain;
  std::vector<double> poison;      // [N], score units
  std::size_t victim = 0;          // first expert of the permutation below: who sinks, or takes all
  std::vector<std::size_t> order;  // experts in random order

  // What training moves. Affinity A_c = common of c's home domain, c mod domains, + c's own.
  double common_spread, own_spread;
  std::vector<double> common;  // [domains × N]
  std::vector<double> own;     // [clusters × N]
  std::vector<double> offset;  // o [N]

  // The batch.
  std::int64_t mixture_step = -1;    // step for which `mixture` and `domain_ids` were drawn
  std::vector<double> domain_share;  // cumulative, [domains]
  std::vector<std::int64_t> mixture;
  std::vector<std::int64_t> next_domain_ids, domain_ids;
  std::vector<std::int64_t> chosen;
  std::vector<float> top_values;
  std::vector<float> probabilities, gate_sums;
  std::vector<float> biased_scores;
  std::vector<double> counts, kept;
  std::int64_t dropped = 0;

  // Scratch rows.
  std::vector<float> base;  // s A_c + o, [clusters × stride]
  std::vector<float> bias, row, gates, share;
  std::vector<float> best_values;  // [k + 1, or k if k = N]
  std::vector<std::uint32_t> best_ids;
  std::vector<double> pull;
};

SimulatedRouter::Plant::Plant(const SimulationOptions& given, int which_layer)
    : options(given),
      layer(which_layer),
      experts(static_cast<std::size_t>(options.experts)),
      stride((experts + kLane - 1) / kLane * kLane),
      k(static_cast<std::size_t>(options.top_k)),
      domains(static_cast<std::size_t>(options.domains)),
      clusters(static_cast<std::size_t>(options.clusters)) {
  const auto of_layer = static_cast<std::uint64_t>(layer);
  noise.resize(kNoiseRows + stride);
  for (std::size_t i = 0; i < noise.size(); ++i)
    noise[i] = static_cast<float>(normal(stream(Stream::kNoise, of_layer), i));

  const std::uint64_t affinity_key = stream(Stream::kAffinity, of_layer);
  common_spread = options.cluster_spread * std::sqrt(options.domain_share);
  own_spread = options.cluster_spread * std::sqrt(1 - options.domain_share);
  for (std::size_t i = 0; i < domains * experts; ++i)
    common.push_back(common_spread * normal(affinity_key, i));
  for (std::size_t i = 0; i < clusters * experts; ++i) {
    own.push_back(own_spread * normal(affinity_key, domains * experts + i));
  }
  const std::uint64_t preference_key = stream(Stream::kPreference, of_layer);
  order.resize(experts);
  const double poison_size = options.score_scale * (options.score_space == ScoreSpace::kLogit ? 4 : 1);
  for (std::size_t i = 0; i < experts; ++i) {
    wanted.push_back(options.preference * normal(preference_key, i));
    poison.push_back(poison_size * normal(preference_key, experts + i));
    order[i] = i;
  }
  for (std::size_t i = experts; i > 1; --i)
    std::swap(order[i - 1], order[hash(preference_key, (i << 32)) % i]);
  // Experts with at least the mean target come first: others could sink without a visible effect.
  if (!options.targets.empty()) {
    std::stable_partition(order.begin(), order.end(), [&](std::size_t i) {
      return options.targets[i] >= 1.0 / static_cast<double>(experts);
    });
  }
  victim = order[0];
  offset = wanted;

  std::vector<double> weights(clusters);
  for (std::size_t d = 0; d < domains; ++d) {
    const std::uint64_t weight_key = stream(Stream::kWeight, d);
    for (std::size_t c = 0; c < clusters; ++c) {
      weights[c] = (c % domains == d ? 1 : kForeignWeight) *
                   static_cast<double>(quick_exp(static_cast<float>(0.5 * normal(weight_key, c))));
    }
    clusters_of_domain.emplace_back(weights);
  }

  domain_share.resize(domains);
  mixture.resize(domains);
  counts.resize(experts);
  kept.resize(experts);
  base.resize(clusters * stride);
  bias.resize(stride);
  row.resize(stride);
  gates.resize(stride);
  share.resize(stride);
  pull.resize(experts);
  best_values.resize(std::min(k + 1, experts));
  best_ids.resize(best_values.size());
  resize_batch(options.tokens);
}

void SimulatedRouter::Plant::resize_batch(std::int64_t tokens) {
  options.tokens = tokens;
  simulated::check(options);
  const std::size_t t = index_of(tokens);
  next_domain_ids.resize(t);
  domain_ids.resize(t);
  chosen.resize(t * k);
  if (k < experts) top_values.resize(t * (k + 1));
  mixture_step = -1;
}

// Shares of the domains in the step `at`, cumulative.
void SimulatedRouter::Plant::draw_mixture(std::int64_t at) {
  const bool shift = options.scenario == Scenario::kShift;
  const bool struck = at >= options.event_step;
  const double spread = options.scenario == Scenario::kNoise && struck ? std::max(options.mixture_spread, 1.0)
                                                                       : options.mixture_spread;
  const std::uint64_t key = stream(Stream::kMixture, static_cast<std::uint64_t>(at));
  double others = 0;
  for (std::size_t d = 0; d < domains; ++d) {
    domain_share[d] = static_cast<double>(quick_exp(static_cast<float>(spread * normal(key, d))));
    if (d + 1 < domains) others += domain_share[d];
  }
  if (shift) domain_share.back() *= struck ? others / domain_share.back() : 0;
  double total = 0;
  for (double& s : domain_share) total = s += total;
  for (double& s : domain_share) s /= total;
}

// The domains of all tokens of step `at`: known to a loader before the batch is routed.
void SimulatedRouter::Plant::draw_domains(std::int64_t at) {
  if (mixture_step == at) return;
  mixture_step = at;
  draw_mixture(at);
  std::fill(mixture.begin(), mixture.end(), 0);
  const std::uint64_t key = stream(Stream::kDomain, static_cast<std::uint64_t>(at));
  const std::size_t tokens = next_domain_ids.size();
  const std::size_t unit = options.sequence_length > 0 ? index_of(options.sequence_length) : 1;
  for (std::size_t first = 0; first < tokens; first += unit) {
    const double u = static_cast<double>(hash(key, first) >> 11) * 0x1p-53;
    std::size_t d = 0;
    while (d + 1 < domains && u >= domain_share[d]) ++d;
    std::fill_n(next_domain_ids.begin() + static_cast<std::ptrdiff_t>(first), unit,
                static_cast<std::int64_t>(d));
    mixture[d] += static_cast<std::int64_t>(unit);
  }
}

// What a scenario does to the router in one blow.
void SimulatedRouter::Plant::strike() {
  const auto sink = [&](std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      offset[order[i]] -= kSink;
      wanted[order[i]] -= kSink;
    }
  };
  if (step == options.event_step) {
    if (options.scenario == Scenario::kDead) sink(static_cast<std::size_t>(options.sunk_experts));
    if (in_collapse(CollapseKind::kDeadThird)) sink(experts / 3);
    if (in_collapse(CollapseKind::kRunaway)) offset[victim] += 1;
  }
  if (step == 0 && in_collapse(CollapseKind::kColdStart)) offset[victim] += kSink;
}

// y of one row of logits. Sums and maxima run in kLane fixed lanes, so that vectorising cannot change a bit.
void SimulatedRouter::Plant::gate_row(const float* logits, float* out, float temperature) const {
  const float inverse = 1.0F / temperature;
  if (options.gate == SimulatedGate::kSigmoid) {
    for (std::size_t i = 0; i < stride; ++i) out[i] = 1.0F / (1.0F + quick_exp(-logits[i] * inverse));
    return;
  }
  float largest = logits[0];
  for (std::size_t i = 1; i < experts; ++i) largest = logits[i] > largest ? logits[i] : largest;
  std::array<float, kLane> lanes{};
  for (std::size_t i = 0; i < stride; i += kLane) {
    for (std::size_t j = 0; j < kLane; ++j) {
      out[i + j] = quick_exp((logits[i + j] - largest) * inverse);
      lanes[j] += out[i + j];
    }
  }
  const float sum =
      ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  const float scale = 1.0F / sum;
  for (std::size_t i = 0; i < stride; ++i) out[i] *= scale;
}

// The k + 1 largest (k if k = N), largest first; of equals the lowest index.
void SimulatedRouter::Plant::select(const float* biased, std::int64_t* chosen_row, float* top) {
  const std::size_t wanted_count = best_values.size();
  float* values = best_values.data();
  std::uint32_t* ids = best_ids.data();
  for (std::size_t i = 0; i < wanted_count; ++i) values[i] = -3.0e38F, ids[i] = 0;
  float lowest = -3.0e38F;
  const std::size_t last = wanted_count - 1;
  for (std::size_t i = 0; i < experts; ++i) {
    const float v = biased[i];
    if (!(v > lowest)) continue;
    std::size_t place = last;
    for (; place > 0 && v > values[place - 1]; --place) {
      values[place] = values[place - 1];
      ids[place] = ids[place - 1];
    }
    values[place] = v;
    ids[place] = static_cast<std::uint32_t>(i);
    lowest = values[last];
  }
  for (std::size_t i = 0; i < k; ++i) chosen_row[i] = static_cast<std::int64_t>(ids[i]);
  if (k < experts) std::copy(values, values + wanted_count, top);
}

void SimulatedRouter::Plant::route_tokens(double temperature, bool keep_probabilities) {
  const std::size_t tokens = chosen.size() / k;
  const double age = options.forming > 0 ? static_cast<double>(step) / options.forming : 1e3;
  const double settled = 1 - static_cast<double>(quick_exp(-static_cast<float>(age)));
  const double sharp = 0.5 + 0.5 * settled, formed = 0.2 + 0.8 * settled;
  const auto spread = static_cast<float>(sharp * options.token_spread);
  for (std::size_t c = 0; c < clusters; ++c) {
    for (std::size_t i = 0; i < experts; ++i) {
      const double affinity = common[c % domains * experts + i] + own[c * experts + i];
      base[c * stride + i] = static_cast<float>(sharp * affinity + formed * offset[i]);
    }
    // Padding never wins, and weighs nothing in a softmax.
    for (std::size_t i = experts; i < stride; ++i) base[c * stride + i] = -1.0e30F;
  }
  double jitter = options.jitter;
  if (options.scenario == Scenario::kNoise && after_event()) jitter = std::max(jitter, 0.5);
  const float shake = static_cast<float>(jitter * temperature);
  const float scale = static_cast<float>(options.score_scale);
  const bool in_logits = options.score_space == ScoreSpace::kLogit;
  const bool gated = !in_logits || keep_probabilities;
  if (keep_probabilities) {
    probabilities.resize(tokens * experts);
    gate_sums.resize(tokens);
  }
  const bool keep_scores = options.biased_scores && k < experts;
  if (keep_scores) biased_scores.resize(tokens * experts);
  const std::uint64_t token_key = stream(Stream::kToken, static_cast<std::uint64_t>(step));
  const std::uint64_t topic_key = stream(Stream::kTopic, static_cast<std::uint64_t>(step));
  const std::size_t length = index_of(options.sequence_length);
  const auto threshold = static_cast<std::uint64_t>(options.coherence * 65536);
  std::fill(counts.begin(), counts.end(), 0.0);

  for (std::size_t t = 0; t < tokens; ++t) {
    const std::uint64_t bits = hash(token_key, t);
    const AliasTable& table = clusters_of_domain[index_of(domain_ids[t])];
    std::size_t cluster;
    if (length > 0 && ((bits >> 32) & 0xffff) < threshold) {
      const std::uint64_t topic = (t / length) * kTopics + bits % kTopics;
      cluster = table.draw(static_cast<std::uint32_t>(hash(topic_key, topic) >> 32));
    } else {
      cluster = table.draw(static_cast<std::uint32_t>(bits));
    }
    const float* centre = &base[cluster * stride];
    const float* own = &noise[bits >> 48];
    float* z = row.data();
    for (std::size_t i = 0; i < stride; ++i) z[i] = centre[i] + spread * own[i];
    if (shake > 0) {
      const float* shaken = &noise[(bits * 0x9e3779b97f4a7c15ULL) >> 48];
      for (std::size_t i = 0; i < stride; ++i) z[i] += shake * shaken[i];
    }
    float* y = gates.data();
    if (gated) gate_row(z, y, static_cast<float>(temperature));
    if (keep_probabilities) {
      float sum = 0;
      for (std::size_t i = 0; i < experts; ++i) sum += y[i];
      gate_sums[t] = sum;
      const float inverse = 1.0F / sum;
      for (std::size_t i = 0; i < experts; ++i) probabilities[t * experts + i] = y[i] * inverse;
    }
    const float* score = in_logits ? z : y;
    for (std::size_t i = 0; i < stride; ++i) z[i] = scale * score[i] + bias[i];
    if (keep_scores) std::copy(z, z + experts, &biased_scores[t * experts]);
    select(z, &chosen[t * k], k < experts ? &top_values[t * (k + 1)] : nullptr);
    for (std::size_t i = 0; i < k; ++i) counts[index_of(chosen[t * k + i])] += 1;
  }
}

void SimulatedRouter::Plant::drop_overflow() {
  kept = counts;
  dropped = 0;
  if (options.capacity_factor <= 0) return;
  const double assignments = static_cast<double>(chosen.size());
  const double capacity = std::ceil(options.capacity_factor * assignments / static_cast<double>(experts));
  for (double& c : kept) {
    dropped += static_cast<std::int64_t>(std::max(0.0, c - capacity));
    c = std::min(c, capacity);
  }
}

// ∂L/∂z_tj = N/(T τ) · p_tj (f_j - Σ_i f_i p_ti), τ the temperature, for normalised sigmoids times 1 - y_tj;
// summed over tokens.
void SimulatedRouter::Plant::pull_by_aux_loss(double weight, double temperature) {
  const std::size_t tokens = gate_sums.size();
  const bool sigmoid = options.gate == SimulatedGate::kSigmoid;
  const double assignments = static_cast<double>(chosen.size());
  for (std::size_t i = 0; i < experts; ++i) share[i] = static_cast<float>(counts[i] / assignments);
  std::fill(pull.begin(), pull.end(), 0.0);
  for (std::size_t t = 0; t < tokens; ++t) {
    const float* p = &probabilities[t * experts];
    float mean = 0;
    for (std::size_t i = 0; i < experts; ++i) mean += share[i] * p[i];
    const float total = sigmoid ? gate_sums[t] : 0.0F;
    for (std::size_t i = 0; i < experts; ++i) {
      pull[i] += static_cast<double>(p[i] * (share[i] - mean) * (1.0F - p[i] * total));
    }
  }
  const double step_size =
      options.aux_pull * weight * static_cast<double>(experts) / (static_cast<double>(tokens) * temperature);
  for (std::size_t i = 0; i < experts; ++i) offset[i] -= step_size * pull[i];
}

void SimulatedRouter::Plant::train() {
  double rich = options.rich;
  const bool lock_in =
      in_collapse(CollapseKind::kColdStart) || (options.scenario == Scenario::kCollapse && after_event() &&
                                                options.collapse != CollapseKind::kPoisonedBias);
  if (lock_in) rich *= kLockIn;
  const double mean_load = static_cast<double>(chosen.size()) / static_cast<double>(experts);
  for (std::size_t i = 0; i < experts; ++i) {
    const double favour = std::min(kept[i] / mean_load, 2.0) - 1;
    offset[i] += options.task_pull * (wanted[i] - offset[i]) + rich * favour;
    offset[i] = std::clamp(offset[i], -kOffsetLimit, kOffsetLimit);
  }
}

// One cluster and one domain a step, one after another: the same diffusion as all at once, at a fraction of the work.
void SimulatedRouter::Plant::walk() {
  const bool drifting = options.scenario == Scenario::kDrift && after_event();
  const double renewed = options.affinity_walk * (drifting ? kDriftFactor : 1);
  const auto at = static_cast<std::uint64_t>(step);
  const std::uint64_t key = hash(stream(Stream::kWalk, at), static_cast<std::uint64_t>(layer));

  const std::size_t c = at % clusters, d = at % domains;
  const double part = std::min(1.0, renewed * static_cast<double>(clusters));
  const double keep = std::sqrt(1 - part), fresh = std::sqrt(part) * own_spread;
  for (std::size_t i = 0; i < experts; ++i) {
    own[c * experts + i] = keep * own[c * experts + i] + fresh * normal(key, i);
  }
  const double part_common = std::min(1.0, renewed * static_cast<double>(domains));
  const double keep_common = std::sqrt(1 - part_common),
               fresh_common = std::sqrt(part_common) * common_spread;
  for (std::size_t i = 0; i < experts; ++i) {
    common[d * experts + i] = keep_common * common[d * experts + i] + fresh_common * normal(key, experts + i);
  }
  if (!drifting) return;
  const double keep_wanted = std::sqrt(1 - renewed), fresh_wanted = std::sqrt(renewed) * options.preference;
  for (std::size_t i = 0; i < experts; ++i) {
    const double before = wanted[i];
    wanted[i] = keep_wanted * before + fresh_wanted * normal(key, 2 * experts + i);
    offset[i] += wanted[i] - before;
  }
}

SimulatedRouter::SimulatedRouter(const SimulationOptions& options, int layer) {
  simulated::check(options);
  plant_ = std::make_unique<Plant>(options, layer);
}
SimulatedRouter::~SimulatedRouter() = default;
SimulatedRouter::SimulatedRouter(const SimulatedRouter& other)
    : plant_(std::make_unique<Plant>(*other.plant_)) {}
SimulatedRouter& SimulatedRouter::operator=(const SimulatedRouter& other) {
  return *this = SimulatedRouter(other);
}
SimulatedRouter::SimulatedRouter(SimulatedRouter&&) noexcept = default;
SimulatedRouter& SimulatedRouter::operator=(SimulatedRouter&&) noexcept = default;

RoutingBatch SimulatedRouter::route(std::span<const double> bias, double aux_loss_weight,
                                    double temperature) {
  Plant& p = *plant_;
  bool good = bias.size() == p.experts && std::isfinite(aux_loss_weight) && aux_loss_weight >= 0 &&
              std::isfinite(temperature) && temperature > 0;
  for (double b : bias) good = good && std::isfinite(b);
  if (!good) {
    throw std::invalid_argument("SimulatedRouter::route: bias must be [" + std::to_string(p.experts) +
                                "] finite values, aux_loss_weight >= 0, temperature > 0");
  }
  p.strike();
  const bool poisoned = p.in_collapse(CollapseKind::kPoisonedBias) && p.after_event();
  for (std::size_t i = 0; i < p.experts; ++i)
    p.bias[i] = static_cast<float>(bias[i] + (poisoned ? p.poison[i] : 0));
  p.draw_domains(p.step);
  std::swap(p.domain_ids, p.next_domain_ids);
  p.mixture_step = -1;
  const bool keep_probabilities = p.options.probabilities || aux_loss_weight > 0;
  p.route_tokens(temperature, keep_probabilities);
  p.drop_overflow();
  if (aux_loss_weight > 0) p.pull_by_aux_loss(aux_loss_weight, temperature);
  p.train();
  p.walk();
  ++p.step;

  RoutingBatch batch;
  batch.experts = p.chosen;
  batch.sequence_length = p.options.sequence_length;
  if (p.k < p.experts) batch.top_values = p.top_values;
  if (p.options.biased_scores && p.k < p.experts) batch.biased_scores = p.biased_scores;
  if (p.options.probabilities) batch.probabilities = p.probabilities;
  batch.domain_ids = p.domain_ids;
  if (p.options.capacity_factor > 0) batch.dropped = p.dropped;
  return batch;
}

std::span<const std::int64_t> SimulatedRouter::next_mixture() {
  plant_->draw_domains(plant_->step);
  return plant_->mixture;
}

std::int64_t SimulatedRouter::step() const {
  return plant_->step;
}
const SimulationOptions& SimulatedRouter::options() const {
  return plant_->options;
}
std::span<const double> SimulatedRouter::preferences() const {
  return plant_->offset;
}
std::span<const double> SimulatedRouter::wanted_preferences() const {
  return plant_->wanted;
}

double SimulatedRouter::displacement() const {
  const std::size_t n = plant_->experts;
  double mean = 0, square = 0;
  for (std::size_t i = 0; i < n; ++i) mean += plant_->offset[i] - plant_->wanted[i];
  mean /= static_cast<double>(n);
  for (std::size_t i = 0; i < n; ++i) {
    const double d = plant_->offset[i] - plant_->wanted[i] - mean;
    square += d * d;
  }
  return square / static_cast<double>(n);
}

void SimulatedRouter::set_tokens(std::int64_t tokens) {
  plant_->resize_batch(tokens);
}

}  // namespace moectl
