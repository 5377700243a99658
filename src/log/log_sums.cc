// The sums of a record.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>

#include "base/input_limits.h"
#include "log/line_reader.h"
#include "measure/offence.h"

namespace moectl {
namespace {

void read_sequences(const LineReader& line, RoutingStats& stats) {
  stats.set_scalar(RoutingStats::kSequences, line.integer("sequences", line.need("sequences")));
  stats.set_scalar(RoutingStats::kSequenceTokens, stats.tokens());
  stats.set_scalar(RoutingStats::kSequenceLenSq,
                   line.integer("sequence_len_sq", line.need("sequence_len_sq")));
  line.integers("sequence_sq", line.need("sequence_sq"), stats.mutable_array(RoutingStats::kSequenceSq));
  line.integers("sequence_cross", line.need("sequence_cross"),
                stats.mutable_array(RoutingStats::kSequenceCross));
}

void read_probabilities(const LineReader& line, RoutingStats& stats) {
  stats.set_scalar(RoutingStats::kProbTokens, stats.tokens());
  stats.set_scalar(RoutingStats::kTokenEntropySum,
                   line.fixed("token_entropy_sum", line.need("token_entropy_sum")));
  line.fixed("prob_sum", line.need("prob_sum"), stats.mutable_array(RoutingStats::kProbSum));
  line.fixed("sqrt_prob_sum", line.need("sqrt_prob_sum"), stats.mutable_array(RoutingStats::kSqrtProbSum));
}

/// For each expert the number of its first bin that holds a token, and the counts from there on. Every token
/// has a margin for every expert.
void read_margins(const LineReader& line, JsonValue margins, RoutingStats& stats) {
  const std::span<std::int64_t> all = stats.mutable_array(RoutingStats::kMargins);
  line.check_array("margins", margins, stats.counts().size());
  std::size_t expert = 0;
  for (const JsonValue entry : margins.elements()) {
    const std::string field = LineReader::at("margins", expert);
    if (!entry.is_array() || entry.size() == 0)
      line.reject(field, entry, "must be an array: first bin, counts");
    const auto first =
        static_cast<std::size_t>(line.integer(LineReader::at(field, 0), JsonValue(*entry.elements().begin()),
                                              0, static_cast<std::int64_t>(kMarginBins)));
    if (first + entry.size() - 1 > kMarginBins) {
      line.reject(field, entry, "must end by bin " + std::to_string(kMarginBins - 1));
    }
    std::int64_t left = stats.tokens();
    std::size_t j = 0;
    for (const JsonValue element : entry.elements()) {
      if (j++ == 0) continue;
      const std::int64_t count = line.integer(LineReader::at(field, j - 1), element, 0, left);
      all[expert * kMarginBins + first + j - 2] = count;
      left -= count;
    }
    if (left != 0) line.reject(field, entry, "must sum to tokens (" + std::to_string(stats.tokens()) + ")");
    ++expert;
  }
  stats.set_scalar(RoutingStats::kMarginTokens, stats.tokens());
}

/// For each expert the number of the first expert behind it that shares a token with it, and the tokens that it shares with
/// each from there on; empty where it shares none.
void read_pairs(const LineReader& line, JsonValue pairs, RoutingStats& stats) {
  const std::span<const std::int64_t> counts = stats.counts();
  const std::span<std::int64_t> all = stats.mutable_array(RoutingStats::kPairs);
  const auto n = static_cast<std::int64_t>(counts.size());
  std::int64_t i = 0;
  for (const JsonValue entry : pairs.elements()) {
    const std::int64_t expert = i++;
    const std::string field = LineReader::at("pairs", static_cast<std::size_t>(expert));
    if (!entry.is_array()) line.reject(field, entry, "must be an array: an expert behind this one, counts");
    std::int64_t other = n;
    std::size_t at = 0;
    for (const JsonValue element : entry.elements()) {
      const std::string place = LineReader::at(field, at);
      if (at++ == 0) {
        if (expert + 1 == n) line.reject(field, entry, "must be empty: no expert is behind the last");
        other = line.integer(place, element, expert + 1, n - 1);
        continue;
      }
      if (other >= n) line.reject(field, entry, "must end by expert " + std::to_string(n - 1));
      const std::int64_t most =
          std::min(counts[static_cast<std::size_t>(expert)], counts[static_cast<std::size_t>(other)]);
      all[stats.pair_index(static_cast<int>(expert), static_cast<int>(other++))] =
          line.integer(place, element, 0, most);
    }
  }
  stats.set_scalar(RoutingStats::kPairTokens, stats.tokens());
}

/// Losses are means over each expert's assignments, null where it had none; the sums weigh them by those.
void read_losses(const LineReader& line, const std::string& field, JsonValue losses,
                 std::span<const std::int64_t> counts, std::span<std::int64_t> sums,
                 std::span<std::int64_t> tokens) {
  constexpr double kMost = kLargestSum / 2;  // of either sign: RoutingStats::valid() wants them under 2^62
  line.check_array(field, losses, sums.size());
  std::size_t next = 0;
  for (const JsonValue loss : losses.elements()) {
    const std::size_t i = next++;
    if (loss.is_null()) continue;
    if (!loss.is_number()) line.reject(LineReader::at(field, i), loss, "must be a number");
    const double sum = loss.as_double() * static_cast<double>(counts[i]);
    if (!(std::abs(sum) <= kMost)) {
      line.reject(LineReader::at(field, i), loss, "must be at most 2.7e11 in sum over its tokens");
    }
    sums[i] = std::llrint(sum / kFixedUnit);
    tokens[i] = counts[i];
  }
}

/// `domain_loss` is the mean over each (domain, expert)'s assignments, null where it had none.
void read_domain_losses(const LineReader& line, JsonValue losses, const Domains& domains,
                        RoutingStats& stats) {
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

void read_domains(const LineReader& line, const Domains& domains, RoutingStats& stats) {
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
        line.fail(LineReader::at(field, i), std::to_string(out[i]),
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

const char* words_of(double whole) {
  return whole > 1 ? "percent that sum to 100" : "shares that sum to 1";
}

/// What the row `counts` sums to if it holds loads (1, or 100 for percent), and 0 if it holds counts. [1,0,0,0] by itself may
/// be one token, or all of the load: the first rows decide it for the whole file, by whether they are whole numbers.
double whole_of_row(const LineReader& line, JsonValue counts, const Assumptions& assumptions) {
  constexpr const char* kInstead = R"(; write shares of the load as "load", with "tokens")";
  bool are_whole = true, are_zero = true;
  for (const JsonValue count : counts.elements()) {
    if (!count.is_number()) return 0;  // whoever reads it as a count names it
    are_whole &= count.is_integer() || count.as_double() == std::floor(count.as_double());
    are_zero &= count.as_double() == 0;
  }
  if (are_zero) return 0;  // no data, of either kind
  const double whole = whole_of(counts);
  const std::optional<CountRows>& rows = assumptions.rows;
  if (!rows) return are_whole ? 0 : whole;
  if (rows->whole > 0 && whole != rows->whole)
    line.reject("counts", counts,
                std::string("must be ") + words_of(rows->whole) + ", as in " + rows->place + kInstead);
  if (rows->whole == 0 && !are_whole && whole > 0)
    line.reject("counts", counts, "must be whole numbers, as in " + rows->place + kInstead);
  return rows->whole;
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
void read_counts(const LineReader& line, JsonValue counts, bool only_load, std::optional<std::int64_t> tokens,
                 const LogDefaults& defaults, Assumptions& assumptions, RoutingStats& stats) {
  const StatsShape& shape = stats.shape();
  const std::span<std::int64_t> out = stats.mutable_array(RoutingStats::kCounts);
  const std::string shown = shape.top_k == 1 ? "" : " / top_k (" + std::to_string(shape.top_k) + ")";
  bool sum_is_known = true;
  const double whole = only_load ? whole_of(counts) : whole_of_row(line, counts, assumptions);
  if (only_load && whole == 0)
    line.reject("load", counts, std::string("must be ") + words_of(1) + ", or " + words_of(100));
  if (whole > 0) {
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
              "no count has more than 11 significant bits, and the sum is not tokens * top_k: "
              "half precision (float16, bfloat16) rounds counts; write them from whole numbers or float32");
  }
  std::optional<std::int64_t> squares;
  if (const auto given = line.find("choices_sq")) squares = line.integer("choices_sq", *given);
  const CheckedCounts checked = check_counts(shape, out, *tokens, squares);
  if (!checked.offence.empty()) line.refuse(checked.offence.words());
  stats.set_scalar(RoutingStats::kTokens, *tokens);
  stats.set_scalar(RoutingStats::kChoicesSq, sum_is_known ? checked.choices_sq : 0);
  if (!only_load && sum > 0 && !assumptions.rows)
    assumptions.rows = CountRows{whole, line.file + ':' + std::to_string(line.number)};
}

}  // namespace

Domains domains_of(JsonValue object) {
  Domains domains;
  for (const auto member : object.members()) domains.emplace_back(member.key, member.value);
  std::ranges::sort(domains, {}, &Domains::value_type::first);
  return domains;
}

RoutingStats read_stats(const LineReader& line, const LogGroup& header,
                        std::optional<std::int64_t> given_tokens, JsonValue counts, bool only_load,
                        const LogDefaults& defaults, Assumptions& assumptions) {
  const char* const name = only_load ? "load" : "counts";
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
  } else if (!header.top_k) {
    line.fail("top_k", "missing", "required where the first line does not give it");
  }
  if (shape.top_k > shape.experts) {
    line.fail(name, std::to_string(counts.size()) + " values",
              "must be at least top_k (" + std::to_string(shape.top_k) + ")");
  }
  const auto gap = line.find("gap_sum");
  const auto gradients = line.find("grad_norm");
  const auto losses = line.find("expert_loss");
  const auto latencies = line.find("latency");
  const auto margins = line.find("margins");
  const auto pairs = line.find("pairs");
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
                 .pairs = pairs.has_value(),
                 .domains = domains ? static_cast<int>(domains->size()) : 0};
  const bool near = line.has_all({"gap_width_sum", "gap_near"});
  if (near && !gap) line.fail("gap_sum", "missing", "required with gap_near");
  // Before memory is taken for them: each array has as many elements as there are experts.
  if (margins) line.check_array("margins", *margins, counts.size());
  if (pairs) line.check_array("pairs", *pairs, counts.size());
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
  read_counts(line, counts, only_load, given_tokens, defaults, assumptions, stats);
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
  if (pairs) read_pairs(line, *pairs, stats);
  if (domains) {
    const Domains by_name = domains_of(*domains);
    read_domains(line, by_name, stats);
    if (domain_losses) read_domain_losses(line, *domain_losses, by_name, stats);
  }
  if (const Offence offence = first_offence(stats); !offence.empty()) {
    const char* const assumed = given_tokens ? "" : "; `tokens` is missing, and was assumed";
    line.refuse(std::string(offence.words()) + assumed);
  }
  return stats;
}

}  // namespace moectl
