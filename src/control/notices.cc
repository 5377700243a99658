#include "control/notices.h"

#include <algorithm>

#include "base/names.h"
#include "base/utf8.h"

namespace moectl {
namespace {

constexpr Names<NoticeKind, kNoticeKindCount> kNames{{"invalid", "missing_input", "policy_failed", "wiring",
                                                      "unresponsive", "fallback", "config", "log", "hold"}};
constexpr std::size_t kTextSize = 240;

}  // namespace

std::string_view name_of(NoticeKind kind) {
  return kNames[kind];
}

std::optional<NoticeKind> notice_kind_of(std::string_view name) {
  return kNames.find(name);
}

Notices::Notices(std::size_t layers) : notices_(4 * layers + 8), texts_(notices_.size() * kTextSize) {}

void Notices::add(NoticeKind kind, int layer, std::int64_t step,
                  std::initializer_list<std::string_view> parts) {
  if (count_ == notices_.size()) {
    notices_.back() = {.kind = kind, .layer = -1, .step = step, .text = "further notices have no room"};
    return;
  }
  char* const text = texts_.data() + count_ * kTextSize;
  std::size_t size = 0;
  for (std::string_view part : parts) {
    while (!part.empty()) {
      const std::size_t bytes = utf8_character(part);
      const std::string_view shown = bytes > 0 ? part.substr(0, bytes) : "?";
      if (size + shown.size() > kTextSize) break;  // never half a character
      std::copy(shown.begin(), shown.end(), text + size);
      size += shown.size();
      part.remove_prefix(std::max<std::size_t>(bytes, 1));
    }
  }
  notices_[count_++] = {.kind = kind, .layer = layer, .step = step, .text = {text, size}};
}

}  // namespace moectl
