#include "control/notices.h"

#include <algorithm>
#include <array>

namespace moectl {
namespace {

constexpr std::array<std::string_view, kNoticeKindCount> kNames = {
    "invalid", "missing_input", "policy_failed", "wiring", "unresponsive", "fallback", "config", "log"};
constexpr std::size_t kTextSize = 240;

}  // namespace

std::string_view name_of(NoticeKind kind) {
  return kNames[static_cast<std::size_t>(kind)];
}

std::optional<NoticeKind> notice_kind_of(std::string_view name) {
  const auto it = std::find(kNames.begin(), kNames.end(), name);
  if (it == kNames.end()) return std::nullopt;
  return static_cast<NoticeKind>(it - kNames.begin());
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
  for (const std::string_view part : parts) {
    const std::size_t most = kTextSize - size;
    std::size_t fits = std::min(part.size(), most);
    // Never half a character of UTF-8.
    while (fits < part.size() && fits > 0 && (static_cast<unsigned char>(part[fits]) & 0xc0) == 0x80) --fits;
    std::copy_n(part.begin(), fits, text + size);
    size += fits;
    if (fits < part.size()) break;
  }
  notices_[count_++] = {.kind = kind, .layer = layer, .step = step, .text = {text, size}};
}

}  // namespace moectl
