#include "log/parts.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "log/reshape.h"

namespace moectl {
namespace {

bool is_numbered(std::string_view text, std::string_view word) {
  return text.size() > word.size() && text.starts_with(word) &&
         text.find_first_not_of("0123456789", word.size()) == std::string_view::npos;
}

/// What two parts of a step say of it together.
void add(LogRecord& to, const LogRecord& more) {
  if (to.stats.experts() != more.stats.experts() || to.stats.top_k() != more.stats.top_k()) {
    throw LogError("layer " + std::to_string(to.layer) + ": step " + std::to_string(to.step) +
                   ": experts and top_k must be the same in all parts of a step");
  }
  // A loss is a mean over tokens.
  const auto before = static_cast<double>(to.stats.tokens()),
             added = static_cast<double>(more.stats.tokens());
  if (to.loss && more.loss && before + added > 0) {
    to.loss = (*to.loss * before + *more.loss * added) / (before + added);
  } else if (!to.loss) {
    to.loss = more.loss;
  }
  add_recorded(to.stats, to.domains, more.stats, more.domains);
  if (__builtin_add_overflow(to.tokens, more.tokens, &to.tokens))
    to.tokens = std::numeric_limits<std::int64_t>::max();
  // Of a run log: what holds for one part alone is measured anew.
  to.metrics.clear();
  to.health.clear();
  to.alerts.clear();
}

}  // namespace

TagParts parts_of(std::string_view tag) {
  TagParts parts;
  const auto append = [](std::string& text, std::string_view segment) {
    if (!text.empty()) text += '/';
    text += segment;
  };
  for (std::size_t from = 0; from <= tag.size();) {
    const std::size_t to = std::min(tag.find('/', from), tag.size());
    const std::string_view segment = tag.substr(from, to - from);
    if (is_numbered(segment, "mb")) {
      parts.micro_batch = true;
    } else {
      append(parts.of_rank, segment);
      if (is_numbered(segment, "rank")) {
        parts.rank = true;
      } else {
        append(parts.rest, segment);
      }
    }
    from = to + 1;
  }
  if (parts.rest.empty()) parts.rest = "train";
  if (parts.of_rank.empty()) parts.of_rank = "train";
  return parts;
}

std::optional<LogRecord> WholeRecords::next() {
  for (;;) {
    if (!ready_.empty()) {
      std::optional<LogRecord> record = std::move(ready_.front());
      ready_.pop_front();
      return record;
    }
    if (end_) return std::nullopt;
    std::optional<LogRecord> record = held_ ? std::exchange(held_, std::nullopt) : reader_.next();
    if (!record) {
      end_ = true;
      join();
      continue;
    }
    if (!parts_.empty() && record->step != parts_.front().step) {
      join();
      held_ = std::move(record);
      continue;
    }
    const TagParts parts = parts_of(record->tag);
    if (!parts.any()) whole_.insert(record->tag);
    if (!parts.any() || record->layer < 0 || record->stats.experts() == 0 || whole_.contains(parts.rest))
      return record;
    parts_.push_back(std::move(*record));
  }
}

void WholeRecords::join() {
  // By layer and tag, then by rank.
  std::map<std::pair<int, std::string>, std::map<std::string, LogRecord>> joined;
  for (LogRecord& part : parts_) {
    const TagParts parts = parts_of(part.tag);
    if (whole_.contains(parts.rest)) {  // it came later in the same step
      ready_.push_back(std::move(part));
      continue;
    }
    part.tag = keep_ranks_ ? parts.of_rank : parts.rest;
    const int layer = part.layer;
    auto& of_layer = joined[{layer, part.tag}];
    const auto it = of_layer.find(parts.of_rank);
    if (it == of_layer.end()) {
      of_layer.emplace(parts.of_rank, std::move(part));
    } else {
      add(it->second, part);
    }
  }
  parts_.clear();
  const bool copies = !joined.empty() && std::ranges::all_of(joined, [](const auto& entry) {
    const LogRecord& first = entry.second.begin()->second;
    return entry.second.size() > 1 && std::ranges::all_of(entry.second, [&](const auto& rank) {
             return std::ranges::equal(rank.second.stats.counts(), first.stats.counts());
           });
  });
  if (copies && say_)
    std::exchange(say_, {})("the ranks hold the same counts: taken once, as copies of the same tokens");
  for (auto& [key, ranks] : joined) {
    LogRecord whole = std::move(ranks.begin()->second);
    for (auto it = std::next(ranks.begin()); it != ranks.end() && !copies; ++it) add(whole, it->second);
    ready_.push_back(std::move(whole));
  }
}

}  // namespace moectl
