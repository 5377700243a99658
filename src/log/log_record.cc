#include "log/log_record.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "base/input_limits.h"
#include "base/printable.h"
#include "measure/offence.h"

namespace moectl {
namespace {

// Above 2^53 a reader of JSON that uses doubles no longer gives the integer that was written.
constexpr std::int64_t kLargestInteger = std::int64_t{1} << 53;
// Of a rotated log; its file names have six digits at least.
constexpr std::int64_t kMostPieces = 1'000'000'000;
// A fixed-point sum holds up to 2^39; beyond it the file holds nothing that this library wrote.
constexpr double kLargestSum = 5.4e11;

/// Reads fields by name and type.
class Line : public LogLine {
 public:
  explicit Line(const LogLine& line) : LogLine(line) {}

  std::optional<JsonValue> find(std::string_view field) const { return object.find(field); }
  JsonValue need(const char* field) const {
    const auto value = find(field);
    if (!value) fail(field, "missing", "required");
    return *value;
  }

  /// Also one that is written with a fraction of 0, as programs do that count in floating point.
  std::int64_t integer(const std::string& field, JsonValue value, std::int64_t least = 0,
                       std::int64_t most = kLargestInteger) const {
    const double real = value.is_number() ? value.as_double() : 0.5;
    if (real != std::floor(real)) reject(field, value, "must be a whole number");
    const std::int64_t whole = value.is_integer() && !value.is_large()
                                   ? value.as_integer()
                                   : static_cast<std::int64_t>(std::clamp(real, -0x1p62, 0x1p62));
    if (whole > most) {
      reject(field, value,
             most == kLargestInteger ? "must be at most 2^53" : "must be at most " + std::to_string(most));
    }
    if (whole < least) reject(field, value, "must be at least " + std::to_string(least));
    return whole;
  }
  double real(const std::string& field, JsonValue value) const {
    if (!value.is_number()) reject(field, value, "must be a number");
    return value.as_double();
  }
  std::string text(const std::string& field, JsonValue value) const {
    if (!value.is_string() || value.text().empty()) reject(field, value, "must be a word in quotes");
    return std::string(value.text());
  }
  /// Checks that the value is an array of one element an expert.
  void check_array(const std::string& field, JsonValue value, std::size_t experts) const {
    if (!value.is_array()) reject(field, value, "must be an array");
    if (value.size() != experts) {
      fail(field, std::to_string(value.size()) + " values",
           "must have " + std::to_string(experts) + ", one for each expert");
    }
  }
  void integers(const std::string& field, JsonValue value, std::span<std::int64_t> out) const {
    check_array(field, value, out.size());
    std::size_t i = 0;
    for (const JsonValue element : value.elements()) {
      // Names of elements cost more than the elements: only those at fault get one.
      const std::int64_t read = element.is_integer() && !element.is_large() ? element.as_integer() : -1;
      out[i] = read >= 0 && read <= kLargestInteger ? read : integer(at(field, i), element);
      ++i;
    }
  }
  /// Sums in fixed point.
  std::int64_t fixed(const std::string& field, JsonValue value) const {
    const double sum = real(field, value);
    if (!(sum >= 0)) reject(field, value, "must be at least 0");
    if (!(sum <= kLargestSum)) reject(field, value, "must be at most 5.4e11");
    return std::llrint(sum / kFixedUnit);
  }
  void fixed(const std::string& field, JsonValue value, std::span<std::int64_t> out) const {
    check_array(field, value, out.size());
    std::size_t i = 0;
    for (const JsonValue element : value.elements()) {
      const double sum = element.is_number() ? element.as_double() : -1;
      out[i] = sum >= 0 && sum <= kLargestSum ? std::llrint(sum / kFixedUnit) : fixed(at(field, i), element);
      ++i;
    }
  }
  /// All of a group of fields, or none.
  bool has_all(std::initializer_list<const char*> fields) const {
    const char* present = nullptr;
    for (const char* field : fields) present = find(field) ? field : present;
    if (!present) return false;
    for (const char* field : fields) {
      if (!find(field)) fail(field, "missing", std::string("required with ") + present);
    }
    return true;
  }

  static std::string at(const std::string& field, std::size_t i) {
    return field + '[' + std::to_string(i) + ']';
  }
};

// ---- The sums of a record. ----

/// The domains of a record, by name.
using Domains = std::vector<std::pair<std::string_view, JsonValue>>;

Domains domains_of(JsonValue object) {
  Domains domains;
  for (const auto member : object.members()) domains.emplace_back(member.key, member.value);
  std::ranges::sort(domains, {}, &Domains::value_type::first);
  return domains;
}

void read_sequences(const Line& line, RoutingStats& stats) {
  stats.set_scalar(RoutingStats::kSequences, line.integer("sequences", line.need("sequences")));
  stats.set_scalar(RoutingStats::kSequenceTokens, stats.tokens());
  stats.set_scalar(RoutingStats::kSequenceLenSq,
                   line.integer("sequence_len_sq", line.need("sequence_len_sq")));
  line.integers("sequence_sq", line.need("sequence_sq"), stats.mutable_array(RoutingStats::kSequenceSq));
  line.integers("sequence_cross", line.need("sequence_cross"),
                stats.mutable_array(RoutingStats::kSequenceCross));
}

void read_probabilities(const Line& line, RoutingStats& stats) {
  stats.set_scalar(RoutingStats::kProbTokens, stats.tokens());
  stats.set_scalar(RoutingStats::kTokenEntropySum,
                   line.fixed("token_entropy_sum", line.need("token_entropy_sum")));
  line.fixed("prob_sum", line.need("prob_sum"), stats.mutable_array(RoutingStats::kProbSum));
  line.fixed("sqrt_prob_sum", line.need("sqrt_prob_sum"), stats.mutable_array(RoutingStats::kSqrtProbSum));
}

/// For each expert the number of its first bin that holds a token, and the counts from there on. Every token
/// has a margin for every expert.
void read_margins(const Line& line, JsonValue margins, RoutingStats& stats) {
  const std::span<std::int64_t> all = stats.mutable_array(RoutingStats::kMargins);
  line.check_array("margins", margins, stats.counts().size());
  std::size_t expert = 0;
  for (const JsonValue entry : margins.elements()) {
    const std::string field = Line::at("margins", expert);
    if (!entry.is_array() || entry.size() == 0)
      line.reject(field, entry, "must be an array: first bin, counts");
    const auto first = static_cast<std::size_t>(line.integer(
        Line::at(field, 0), JsonValue(*entry.elements().begin()), 0, static_cast<std::int64_t>(kMarginBins)));
    if (first + entry.size() - 1 > kMarginBins) {
      line.reject(field, entry, "must end by bin " + std::to_string(kMarginBins - 1));
    }
    std::int64_t left = stats.tokens();
    std::size_t j = 0;
    for (const JsonValue element : entry.elements()) {
      if (j++ == 0) continue;
      const std::int64_t count = line.integer(Line::at(field, j - 1), element, 0, left);
      all[expert * kMarginBins + first + j - 2] = count;
      left -= count;
    }
    if (left != 0) line.reject(field, entry, "must sum to tokens (" + std::to_string(stats.tokens()) + ")");
    ++expert;
  }
  stats.set_scalar(RoutingStats::kMarginTokens, stats.tokens());
}

/// Losses are means over each expert's assignments, null where it had none; the sums weigh them by those.
void read_losses(const Line& line, const std::string& field, JsonValue losses,
                 std::span<const std::int64_t> counts, std::span<std::int64_t> sums,
                 std::span<std::int64_t> tokens) {
  constexpr double kMost = kLargestSum / 2;  // of either sign: RoutingStats::valid() wants them under 2^62
  line.check_array(field, losses, sums.size());
  std::size_t next = 0;
  for (const JsonValue loss : losses.elements()) {
    const std::size_t i = next++;
    if (loss.is_null()) continue;
    if (!loss.is_number()) line.reject(Line::at(field, i), loss, "must be a number");
    const double sum = loss.as_double() * static_cast<double>(counts[i]);
    if (!(std::abs(sum) <= kMost)) {
      line.reject(Line::at(field, i), loss, "must be at most 2.7e11 in sum over its tokens");
    }
    sums[i] = std::llrint(sum / kFixedUnit);
    tokens[i] = counts[i];
  }
}

/// `domain_loss` is the mean over each (domain, expert)'s assignments, null where it had none.
void read_domain_losses(const Line& line, JsonValue losses, const Domains& domains, RoutingStats& stats) {
  if (!losses.is_object()) line.reject("domain_loss", losses, "must be an object of arrays");
  const std::size_t n = stats.counts().size();
  for (const auto [key, values] : losses.members()) {
    const std::string field = "domain_loss." + std::string(key);
    const auto it = std::ranges::lower_bound(domains, key, {}, &Domains::value_type::first);
    if (it == domains.end() || it->first != key) line.fail(field, "unknown", "must be in domain_counts");
    const auto d = static_cast<std::size_t>(std::distance(domains.begin(), it));
    read_losses(line, field, values, stats.domain_counts(static_cast<int>(d)),
                stats.mutable_array(RoutingStats::kDomainLossSum).subspan(d * n, n),
                stats.mutable_array(RoutingStats::kDomainLossTokens).subspan(d * n, n));
  }
}

void read_domains(const Line& line, const Domains& domains, RoutingStats& stats) {
  const auto counts = stats.counts();
  const std::span<std::int64_t> all = stats.mutable_array(RoutingStats::kDomainCounts);
  std::vector<std::int64_t> sums(counts.size(), 0);
  std::size_t at = 0;
  std::int64_t assignments = 0;
  for (const auto& [name, values] : domains) {
    const std::string field = "domain_counts." + std::string(name);
    const std::span<std::int64_t> out = all.subspan(at++ * counts.size(), counts.size());
    line.integers(field, values, out);
    for (std::size_t i = 0; i < out.size(); ++i) {
      sums[i] += out[i];
      assignments += out[i];
      if (sums[i] > counts[i]) {
        line.fail(Line::at(field, i), std::to_string(out[i]),
                  "must not sum over domains above counts[" + std::to_string(i) + "] (" +
                      std::to_string(counts[i]) + ")");
      }
    }
  }
  // All tokens belong to a domain, or the sums are partial and no metric may use them.
  const bool whole = assignments == stats.assignments();
  stats.set_scalar(RoutingStats::kDomainTokens, whole ? stats.tokens() : assignments / stats.top_k());
}

// ---- Loads, and what is not written. ----

/// Whether real-valued counts were held in half precision: all have at most the 11 significant bits of float16, which so
/// many larger counts do not by chance.
bool is_rounded(JsonValue values, std::span<const std::int64_t> counts) {
  constexpr int kBits = 11, kCertain = 16;
  bool real = false;
  for (const JsonValue value : values.elements()) real |= !value.is_integer();
  int left_out = 0;
  for (const std::int64_t count : counts) {
    const int more = std::max(0, static_cast<int>(std::bit_width(static_cast<std::uint64_t>(count))) - kBits);
    if ((count & ((std::int64_t{1} << more) - 1)) != 0) return false;
    left_out += more;
  }
  return real && left_out >= kCertain;
}

/// 1 for shares of the load, 100 for percent, 0 for anything else.
double whole_of(JsonValue loads) {
  double sum = 0;
  for (const JsonValue load : loads.elements()) {
    if (!load.is_number() || !(load.as_double() >= 0)) return 0;
    sum += load.as_double();
  }
  constexpr double kRounding = 0.005;  // of loads written with few digits
  for (const double whole : {1.0, 100.0}) {
    if (std::abs(sum / whole - 1) < kRounding) return whole;
  }
  return 0;
}

/// Whether `counts` can only be loads: not all are whole, and they sum to 1 or 100.
bool are_loads(JsonValue counts) {
  bool whole = true;
  for (const JsonValue count : counts.elements())
    whole &= count.is_integer() || !count.is_number() || count.as_double() == std::floor(count.as_double());
  return !whole && whole_of(counts) > 0;
}

/// Loads as whole counts that sum to `assignments`: rounded down, and the largest remainders up.
void counts_of_loads(JsonValue loads, std::int64_t assignments, std::span<std::int64_t> counts) {
  std::vector<double> exact;
  double sum = 0;
  for (const JsonValue load : loads.elements()) sum += load.as_double();
  for (const JsonValue load : loads.elements())
    exact.push_back(load.as_double() / sum * static_cast<double>(assignments));
  std::vector<std::size_t> order(exact.size());
  std::int64_t left = assignments;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    order[i] = i;
    counts[i] = static_cast<std::int64_t>(exact[i]);
    left -= counts[i];
  }
  std::ranges::stable_sort(order, std::greater<>(),
                           [&](std::size_t i) { return exact[i] - std::floor(exact[i]); });
  for (std::size_t j = 0; left > 0; ++j, --left) ++counts[order[j % order.size()]];
}

/// The counts of a record, its tokens, and Σ_t k_t².
void read_counts(const Line& line, JsonValue counts, bool are_shares, std::optional<std::int64_t> tokens,
                 const LogDefaults& defaults, Assumptions& assumptions, RoutingStats& stats) {
  const StatsShape& shape = stats.shape();
  const std::span<std::int64_t> out = stats.mutable_array(RoutingStats::kCounts);
  const std::string shown = shape.top_k == 1 ? "" : " / top_k (" + std::to_string(shape.top_k) + ")";
  bool sum_is_known = true;
  if (are_shares) {
    const double whole = whole_of(counts);
    if (whole == 0) line.reject("load", counts, "must be shares that sum to 1, or percent that sum to 100");
    const std::string read_as = std::string("read as ") + (whole > 1 ? "percent" : "shares") + " of the load";
    constexpr std::int64_t kFine = 1 << 20;  // tokens, so that no share is rounded much
    sum_is_known = tokens || defaults.tokens;
    if (sum_is_known) {
      assumptions.say(line, "counts", read_as);
      if (!tokens) {
        assumptions.say(line, "tokens",
                        "missing: taken as " + std::to_string(*defaults.tokens) + ", model.tokens_per_step");
      }
    } else {
      assumptions.say(line, "counts",
                      read_as + " of " + std::to_string(kFine) +
                          " tokens, since `tokens` is missing: without it no floor is known");
    }
    tokens = tokens ? tokens : defaults.tokens.value_or(kFine);
    if (*tokens > kLargestInteger / shape.top_k) line.fail("tokens", std::to_string(*tokens), "too many");
    counts_of_loads(counts, *tokens * shape.top_k, out);
  } else {
    line.integers("counts", counts, out);
  }
  std::int64_t sum = 0;
  for (const std::int64_t count : out) sum += std::min(count, kLargestInteger - sum);
  if (!tokens) {
    tokens = (sum + shape.top_k - 1) / shape.top_k;
    assumptions.say(line, "tokens", "missing: read as the sum of the counts" + shown);
  }
  const bool all_counted = *tokens <= kLargestInteger / shape.top_k && sum == *tokens * shape.top_k;
  if (!all_counted && is_rounded(counts, out)) {
    line.fail("counts", "sum " + std::to_string(sum),
              "no count has more than 11 significant bits, and the sum is not tokens * top_k: half precision "
              "(float16, "
              "bfloat16) rounds counts; write them from whole numbers or float32");
  }
  std::optional<std::int64_t> squares;
  if (const auto given = line.find("choices_sq")) squares = line.integer("choices_sq", *given);
  const CheckedCounts checked = check_counts(shape, out, *tokens, squares);
  if (!checked.offence.empty()) line.refuse(checked.offence.words());
  stats.set_scalar(RoutingStats::kTokens, *tokens);
  stats.set_scalar(RoutingStats::kChoicesSq, sum_is_known ? checked.choices_sq : 0);
}

RoutingStats read_stats(const Line& line, const LogGroup& header, std::optional<std::int64_t> given_tokens,
                        JsonValue counts, bool are_shares, const LogDefaults& defaults,
                        Assumptions& assumptions) {
  const char* const name = are_shares ? "load" : "counts";
  if (!counts.is_array() || counts.size() == 0)
    line.reject(name, counts, "must be an array, one for each expert");
  if (counts.size() > static_cast<std::size_t>(kMostExperts)) {
    line.fail(name, std::to_string(counts.size()) + " values",
              "must be at most " + std::to_string(kMostExperts));
  }
  if (header.experts) line.check_array(name, counts, static_cast<std::size_t>(*header.experts));
  StatsShape shape;
  shape.experts = static_cast<int>(counts.size());
  shape.top_k = header.top_k.value_or(0);
  if (const auto top_k = line.find("top_k")) {
    shape.top_k = static_cast<int>(line.integer("top_k", *top_k, 1, shape.experts));
    if (header.top_k && shape.top_k != *header.top_k) {
      line.reject("top_k", *top_k, "must be " + std::to_string(*header.top_k) + ", as the first line says");
    }
  } else if (!header.top_k && defaults.top_k) {
    shape.top_k = *defaults.top_k;
    assumptions.say(line, "top_k", "missing: taken as " + std::to_string(shape.top_k) + ", model.top_k");
    if (shape.top_k > shape.experts) line.check_array(name, counts, static_cast<std::size_t>(shape.top_k));
  } else if (!header.top_k) {
    line.fail("top_k", "missing", "required where the first line does not give it");
  }
  const auto gap = line.find("gap_sum");
  const auto gradients = line.find("grad_norm");
  const auto losses = line.find("expert_loss");
  const auto latencies = line.find("latency");
  const auto margins = line.find("margins");
  const auto domains = line.find("domain_counts");
  const auto domain_losses = line.find("domain_loss");
  if (domain_losses && !domains) line.fail("domain_counts", "missing", "required with domain_loss");
  if (domains && !domains->is_object()) line.reject("domain_counts", *domains, "must be an object of arrays");
  shape.needs = {.gap = gap.has_value(),
                 .sequences = line.has_all({"sequences", "sequence_sq", "sequence_cross", "sequence_len_sq"}),
                 .probabilities = line.has_all({"prob_sum", "sqrt_prob_sum", "token_entropy_sum"}),
                 .gradients = gradients.has_value(),
                 .losses = losses.has_value(),
                 .domain_losses = domain_losses.has_value(),
                 .latencies = latencies.has_value(),
                 .margins = margins.has_value(),
                 .domains = domains ? static_cast<int>(domains->size()) : 0};
  const bool near = line.has_all({"gap_width_sum", "gap_near"});
  if (near && !gap) line.fail("gap_sum", "missing", "required with gap_near");
  // Before memory is taken for them: each array has as many elements as there are experts.
  if (margins) line.check_array("margins", *margins, counts.size());
  for (const auto& [field, by_domain] :
       {std::pair{"domain_counts.", &domains}, std::pair{"domain_loss.", &domain_losses}}) {
    if (!*by_domain || !(*by_domain)->is_object()) continue;
    for (const auto member : (*by_domain)->members())
      line.check_array(field + std::string(member.key), member.value, counts.size());
  }
  if (const std::size_t numbers = shape.flat_size(); numbers > static_cast<std::size_t>(kMostNumbers)) {
    line.fail(name, std::to_string(numbers) + " numbers in all sums",
              "must be at most " + std::to_string(kMostNumbers));
  }
  RoutingStats stats(shape);
  read_counts(line, counts, are_shares || are_loads(counts), given_tokens, defaults, assumptions, stats);
  const std::int64_t tokens = stats.tokens();
  if (gap) {
    stats.set_scalar(RoutingStats::kGapSum, line.fixed("gap_sum", *gap));
    stats.set_scalar(RoutingStats::kGapTokens, tokens);
    if (near) {
      stats.set_scalar(RoutingStats::kGapWidthSum, line.fixed("gap_width_sum", *line.find("gap_width_sum")));
      line.integers("gap_near", *line.find("gap_near"), stats.mutable_array(RoutingStats::kGapNear));
    }
  }
  if (shape.needs.sequences) read_sequences(line, stats);
  if (shape.needs.probabilities) read_probabilities(line, stats);
  if (const auto dropped = line.find("dropped"); dropped && !dropped->is_null()) {
    stats.set_scalar(RoutingStats::kDropped, line.integer("dropped", *dropped, 0, stats.assignments()));
    stats.set_scalar(RoutingStats::kDropTokens, tokens);
  }
  for (const auto& [name, sum, records] : RoutingStats::recorded_values()) {
    const auto value = line.find(name);
    if (!value || value->is_null()) continue;
    stats.set_scalar(sum, line.fixed(std::string(name), *value));
    stats.set_scalar(records, 1);
  }
  if (gradients) {
    line.fixed("grad_norm", *gradients, stats.mutable_array(RoutingStats::kGradNormSum));
    stats.set_scalar(RoutingStats::kGradRecords, 1);
  }
  if (latencies) {
    line.fixed("latency", *latencies, stats.mutable_array(RoutingStats::kLatencySum));
    stats.set_scalar(RoutingStats::kLatencyRecords, 1);
  }
  if (losses) {
    read_losses(line, "expert_loss", *losses, stats.counts(),
                stats.mutable_array(RoutingStats::kExpertLossSum),
                stats.mutable_array(RoutingStats::kExpertLossTokens));
  }
  if (margins) read_margins(line, *margins, stats);
  if (domains) {
    const Domains by_name = domains_of(*domains);
    read_domains(line, by_name, stats);
    if (domain_losses) read_domain_losses(line, *domain_losses, by_name, stats);
  }
  return stats;
}

// ---- What only run logs have. ----

void read_values(const Line& line, const std::string& field, JsonValue entry, const char* key,
                 std::vector<double>& out) {
  const auto it = entry.find(key);
  if (!it || it->is_null()) return;
  if (!it->is_array()) line.reject(field + '.' + key, *it, "must be an array");
  out.reserve(it->size());
  for (const JsonValue value : it->elements()) {
    if (value.is_number()) {
      out.push_back(value.as_double());
    } else {
      const std::size_t i = out.size();
      out.push_back(value.is_null() ? std::nan("") : line.real(Line::at(field + '.' + key, i), value));
    }
  }
}

void read_extent(const Line& line, const std::string& field, JsonValue entry, LoggedActuator& actuator) {
  if (!actuator.applied.empty()) {
    const auto [min, max] = std::minmax_element(actuator.applied.begin(), actuator.applied.end());
    actuator.min = *min;
    actuator.max = *max;
    return;
  }
  for (const auto& [key, out] : {std::pair{"min", &actuator.min}, std::pair{"max", &actuator.max}}) {
    const auto value = entry.find(key);
    if (value && !value->is_null()) *out = line.real(field + '.' + key, *value);
  }
}

void read_words(const Line& line, const std::string& field, JsonValue list, std::vector<std::string>& out) {
  if (!list.is_array()) line.reject(field, list, "must be an array");
  for (const JsonValue word : list.elements()) out.push_back(line.text(Line::at(field, out.size()), word));
}

void read_notices(const Line& line, JsonValue notices, LogRecord& record) {
  if (!notices.is_array()) line.reject("notices", notices, "must be an array");
  for (const JsonValue notice : notices.elements()) {
    const std::string field = Line::at("notices", record.notices.size());
    if (!notice.is_object()) line.reject(field, notice, "must be an object");
    const auto part = [&](const char* name) {
      const auto value = notice.find(name);
      if (!value) line.fail(field + '.' + name, "missing", "required");
      return *value;
    };
    record.notices.push_back({.kind = line.text(field + ".kind", part("kind")),
                              .text = line.text(field + ".text", part("text")),
                              .step = line.integer(field + ".step", part("step"))});
  }
}

void read_responsiveness(const Line& line, const std::string& field, JsonValue found, Responsiveness& out) {
  if (!found.is_object()) line.reject(field, found, "must be an object");
  const auto state = found.find("state");
  if (!state) line.fail(field + ".state", "missing", "required");
  // A name that is not known yet is none that can be judged.
  out.state = response_of(line.text(field + ".state", *state)).value_or(Response::kNotApplicable);
  for (const auto& [key, value] : {std::pair{"gain", &out.gain}, std::pair{"error", &out.error}}) {
    if (const auto number = found.find(key)) *value = line.real(field + '.' + key, *number);
  }
  if (const auto late = found.find("late")) {
    out.late = static_cast<int>(std::min<std::int64_t>(line.integer(field + ".late", *late), 1000));
  }
  if (const auto slope = found.find("slope")) out.scaled = line.text(field + ".slope", *slope) == "measured";
}

void read_decisions(const Line& line, LogRecord& record) {
  if (const auto metrics = line.find("metrics")) {
    if (!metrics->is_object()) line.reject("metrics", *metrics, "must be an object");
    for (const auto member : metrics->members()) {
      const JsonValue value = member.value;
      if (value.is_null() || value.is_array()) continue;
      const std::string name(member.key);
      record.metrics.emplace(name,
                             value.is_number() ? value.as_double() : line.real("metrics." + name, value));
    }
  }
  if (const auto health = line.find("health")) record.health = line.text("health", *health);
  if (const auto alerts = line.find("alerts")) read_words(line, "alerts", *alerts, record.alerts);
  if (const auto found = line.find("responsiveness"))
    read_responsiveness(line, "responsiveness", *found, record.responsiveness);
  if (const auto notices = line.find("notices")) read_notices(line, *notices, record);
  if (const auto actuators = line.find("actuators")) {
    if (!actuators->is_object()) line.reject("actuators", *actuators, "must be an object");
    for (const auto member : actuators->members()) {
      const JsonValue entry = member.value;
      const std::string name(member.key);
      const std::string field = "actuators." + name;
      if (!entry.is_object()) line.reject(field, entry, "must be an object");
      LoggedActuator& actuator = record.actuators[name];
      read_values(line, field, entry, "proposed", actuator.proposed);
      read_values(line, field, entry, "applied", actuator.applied);
      read_values(line, field, entry, "deployed", actuator.deployed);
      read_extent(line, field, entry, actuator);
      if (const auto reasons = entry.find("reasons")) {
        read_words(line, field + ".reasons", *reasons, actuator.reasons);
      }
      if (const auto found = entry.find("responsiveness"))
        read_responsiveness(line, field + ".responsiveness", *found, actuator.responsiveness);
    }
  }
}

// Null if they are equal.
std::shared_ptr<const LoadTargets> read_targets(const Line& line, const std::string& field, JsonValue targets,
                                                std::optional<int> experts) {
  if (!targets.is_array()) line.reject(field, targets, "must be an array");
  std::vector<double> shares;
  for (const JsonValue share : targets.elements())
    shares.push_back(line.real(Line::at(field, shares.size()), share));
  if (shares.empty()) return nullptr;
  try {
    LoadTargets read(experts.value_or(static_cast<int>(shares.size())), shares);
    return read.equal() ? nullptr : std::make_shared<const LoadTargets>(std::move(read));
  } catch (const std::invalid_argument& e) {
    line.reject(field, targets, e.what());
  }
}

/// Groups of layers: those of a trace, or of a run's config.
void read_groups(const Line& line, JsonValue from, const std::string& key, LogHeader& header) {
  const auto groups = from.find(key);
  if (!groups) return;
  if (!groups->is_array()) line.reject(key, *groups, "must be an array of groups");
  const std::optional<int> experts = std::exchange(header.experts, std::nullopt);
  const std::optional<int> top_k = std::exchange(header.top_k, std::nullopt);
  std::int64_t layers = 0;
  std::size_t g = 0;
  for (const JsonValue value : groups->elements()) {
    const std::string path = Line::at(key, g++) + '.';
    if (!value.is_object()) line.reject(path, value, "must be an object");
    LogGroup group{{}, experts, top_k, header.targets};
    const std::string ids_key = header.is_run ? "ids" : "layers";
    const auto ids = value.find(ids_key);
    if (!ids || !ids->is_array()) line.fail(path + ids_key, "missing", "required: an array of layer ids");
    for (const JsonValue id : ids->elements()) {
      group.layers.push_back(static_cast<int>(line.integer(path + ids_key, id, 0, 1 << 30)));
    }
    for (const auto& [name, out] : {std::pair{"experts", &group.experts}, std::pair{"top_k", &group.top_k}}) {
      if (const auto number = value.find(name))
        *out = static_cast<int>(line.integer(path + name, *number, 1, kMostExperts));
    }
    if (!group.experts) line.fail(path + "experts", "missing", "required");
    if (!group.top_k) line.fail(path + "top_k", "missing", "required");
    if (*group.top_k > *group.experts) {
      line.fail(path + "top_k", std::to_string(*group.top_k),
                "must be at most experts (" + std::to_string(*group.experts) + ")");
    }
    if (const auto targets = value.find("targets")) {
      group.targets = read_targets(line, path + "targets", *targets, group.experts);
    } else if (group.experts != experts) {
      group.targets = nullptr;
    }
    layers += static_cast<std::int64_t>(group.layers.size());
    header.groups.push_back(std::move(group));
  }
  header.layers = static_cast<int>(layers);
  header.targets = nullptr;
}

}  // namespace

void LogLine::fail(const std::string& field, const std::string& value, const std::string& constraint) const {
  throw LogError(file + ':' + std::to_string(number) + ": " + field + ": " + value + ": " + constraint);
}

void LogLine::refuse(std::string_view words) const {
  throw LogError(file + ':' + std::to_string(number) + ": " + std::string(words));
}

void LogLine::reject(const std::string& field, JsonValue value, const std::string& constraint) const {
  fail(field, shown_briefly(value.dump()), constraint);
}

LogHeader read_header(const LogLine& at, bool any_version) {
  const Line line(at);
  LogHeader header;
  const std::string format = line.text("format", line.need("format"));
  if (format != "moectl-trace" && format != "moectl-run") {
    line.reject("format", line.need("format"), "must be moectl-trace or moectl-run");
  }
  header.is_run = format == "moectl-run";
  if (!any_version && line.integer("version", line.need("version")) != 1) {
    line.reject("version", line.need("version"), "must be 1, the only version there is");
  }
  JsonValue from = line.object;
  std::string prefix;
  if (header.is_run) {
    const JsonValue config = line.need("config");
    if (!config.is_object()) line.reject("config", config, "must be an object");
    header.config_json = config.dump();
    const auto model = config.find("model");
    if (!model || !model->is_object()) line.fail("config.model", "missing", "required");
    from = *model;
    prefix = "config.model.";
  }
  for (const auto& [key, out] : {std::pair{"layers", &header.layers}, std::pair{"experts", &header.experts},
                                 std::pair{"top_k", &header.top_k}}) {
    if (const auto value = from.find(key)) {
      *out = static_cast<int>(
          line.integer(prefix + key, *value, 1, out == &header.layers ? kMostLayers : kMostExperts));
    }
  }
  if (header.top_k && header.experts && *header.top_k > *header.experts) {
    line.fail(prefix + "top_k", std::to_string(*header.top_k),
              "must be at most experts (" + std::to_string(*header.experts) + ")");
  }
  if (const auto targets = from.find("targets"); targets && header.is_run)
    header.targets = read_targets(line, prefix + "targets", *targets, header.experts);
  const JsonValue groups_of = header.is_run ? line.need("config") : line.object;
  read_groups(line, groups_of, header.is_run ? "layers" : "groups", header);
  if (const auto shift = line.find("shift")) header.shift = line.integer("shift", *shift);
  if (const auto piece = line.find("piece")) header.piece = line.integer("piece", *piece, 1, kMostPieces);
  return header;
}

bool is_config_change(const LogLine& line, const LogHeader& header) {
  return header.is_run && line.object.find("config") && !line.object.find("layer");
}

ConfigChange read_config_change(const LogLine& at) {
  const Line line(at);
  const JsonValue config = line.need("config");
  if (!config.is_object()) line.reject("config", config, "must be an object");
  return {line.integer("step", line.need("step")), config.dump()};
}

void Assumptions::say(const LogLine& line, const std::string& field, const std::string& what) {
  if (fields_.insert(field).second)
    said_.push_back("assumed: " + line.file + ':' + std::to_string(line.number) + ": " + field + ": " + what);
}

LogRecord read_record(const LogLine& at, const LogHeader& header, const LogDefaults& defaults,
                      Assumptions& assumptions) {
  const Line line(at);
  LogRecord record;
  record.line = at.number;
  record.step = line.integer("step", line.need("step"));
  const JsonValue layer = line.need("layer");
  const bool whole_model = header.is_run && layer.is_null();
  if (!whole_model) {
    // A trace may use the model's own numbers.
    const bool numbered = header.layers && header.is_run && header.groups.empty();
    const std::int64_t last = numbered ? *header.layers - 1 : std::int64_t{1} << 30;
    record.layer = static_cast<int>(line.integer("layer", layer, 0, last));
  }
  if (const auto tag = line.find("tag")) record.tag = line.text("tag", *tag);
  if (const auto loss = line.find("loss"); loss && !loss->is_null()) record.loss = line.real("loss", *loss);
  if (const auto mixture = line.find("next_mixture")) {
    if (!mixture->is_object()) line.reject("next_mixture", *mixture, "must be an object of token counts");
    for (const auto [key, tokens] : mixture->members()) {
      const std::string name(key);
      record.next_mixture[name] = line.integer("next_mixture." + name, tokens);
    }
  }
  if (!whole_model) {
    const LogGroup equal{{}, header.experts, header.top_k, header.targets};
    const LogGroup* group = &equal;
    if (!header.groups.empty()) {
      const auto has = [&](const LogGroup& one) {
        return std::ranges::find(one.layers, record.layer) != one.layers.end();
      };
      const auto found = std::ranges::find_if(header.groups, has);
      if (found == header.groups.end())
        line.reject("layer", layer, "must be in one of the groups of the first line");
      group = &*found;
    }
    // A run log with `per_expert: false` has no counts; a trace has them, or loads instead.
    const auto load = line.find("load");
    const bool only_load = load && !header.is_run && !line.find("counts");
    const auto counts = only_load       ? load
                        : header.is_run ? line.find("counts")
                                        : std::optional(line.need("counts"));
    std::optional<std::int64_t> tokens;
    if (header.is_run || line.find("tokens")) tokens = line.integer("tokens", line.need("tokens"));
    if (counts) record.stats = read_stats(line, *group, tokens, *counts, only_load, defaults, assumptions);
    record.tokens = counts ? record.stats.tokens() : *tokens;
    if (!counts || !group->targets || group->targets->experts() == record.stats.experts())
      record.targets = group->targets;
    if (const auto domains = line.find("domain_counts"); domains && counts) {
      for (const auto& [name, values] : domains_of(*domains)) record.domains.emplace_back(name);
    }
  }
  if (header.is_run) read_decisions(line, record);
  return record;
}

}  // namespace moectl
