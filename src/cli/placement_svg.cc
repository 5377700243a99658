#include "cli/placement_svg.h"

#include <algorithm>
#include <numeric>
#include <set>

#include "base/format.h"

namespace moectl::cli {
namespace {

constexpr double kWidth = 960, kMargin = 46, kGap = 40, kHeight = 150, kRow = kHeight + 62, kTop = 58;

std::string text_at(double x, double y, const std::string& text, const char* more = "") {
  return "<text x=\"" + fixed(x, 1) + "\" y=\"" + fixed(y, 1) + "\"" + more + ">" + text + "</text>\n";
}

/// The copies of experts that were not on the device before; the first one, where a device holds several.
std::vector<bool> moved(const Placement& from, const Placement& to) {
  const std::size_t room = to.experts.size() / static_cast<std::size_t>(to.devices);
  const std::size_t room_before = from.experts.size() / static_cast<std::size_t>(from.devices);
  std::vector<bool> out(to.experts.size(), false);
  for (std::size_t d = 0; d < static_cast<std::size_t>(to.devices); ++d) {
    const auto first = from.experts.begin() + static_cast<std::ptrdiff_t>(d * room_before);
    std::set<int> held(first, first + static_cast<std::ptrdiff_t>(room_before));
    for (std::size_t s = d * room; s < (d + 1) * room; ++s) {
      out[s] = held.insert(to.experts[s]).second;
    }
  }
  return out;
}

/// The bars of one placement, from `left` on; `top` is the largest value of the axis.
std::string bars(const Placement& placement, const std::vector<bool>& moves, std::span<const double> loads,
                 double left, double width, double base, double top) {
  const auto devices = static_cast<std::size_t>(placement.devices);
  const std::size_t room = placement.experts.size() / devices;
  std::vector<double> copies(loads.size(), 0);
  for (const int expert : placement.experts) copies[static_cast<std::size_t>(expert)] += 1;
  const double mean = std::accumulate(loads.begin(), loads.end(), 0.0) / static_cast<double>(devices);
  const double pitch = width / static_cast<double>(devices), bar = std::min(0.8 * pitch, 60.0);
  std::string out;
  for (std::size_t d = 0; d < devices; ++d) {
    // The heaviest copy at the bottom.
    std::vector<std::size_t> slots(room);
    std::iota(slots.begin(), slots.end(), d * room);
    const auto share = [&](std::size_t slot) {
      const auto expert = static_cast<std::size_t>(placement.experts[slot]);
      return mean > 0 ? loads[expert] / copies[expert] / mean : 0;
    };
    std::ranges::stable_sort(slots, [&](std::size_t a, std::size_t b) { return share(a) > share(b); });
    const double x = left + pitch * (static_cast<double>(d) + 0.5) - bar / 2;
    double y = base, sum = 0;
    for (std::size_t r = 0; r < room; ++r) {
      const double load = share(slots[r]), height = load / top * kHeight;
      const bool moves_here = moves[slots[r]];
      const std::string expert = std::to_string(placement.experts[slots[r]]);
      y -= height;
      sum += load;
      out += "<rect x=\"" + fixed(x, 1) + "\" y=\"" + fixed(y, 2) + "\" width=\"" + fixed(bar, 1) +
             "\" height=\"" + fixed(height, 2) + "\" class=\"" + (moves_here ? "moved" : "kept") +
             (r % 2 ? " odd" : "") + "\"><title>device " + std::to_string(d) + ", expert " + expert + ": " +
             fixed(load, 3) + (moves_here ? ", moves here" : "") + "</title></rect>\n";
      if (height >= 11 && bar >= 16)
        out += text_at(x + bar / 2, y + height / 2 + 3.5, expert, " class=\"in\"");
    }
    if (devices <= 16) {
      out += text_at(x + bar / 2, y - 4, fixed(sum, 2), " class=\"mid\"");
      out += text_at(x + bar / 2, base + 13, std::to_string(d), " class=\"mid\"");
    }
  }
  return out;
}

double largest_device(const Placement& placement, std::span<const double> loads) {
  const std::vector<double> devices = device_loads(placement, loads);
  const double sum = std::accumulate(devices.begin(), devices.end(), 0.0);
  return sum > 0 ? *std::ranges::max_element(devices) * static_cast<double>(devices.size()) / sum : 1;
}

}  // namespace

std::string placement_svg(std::span<const DrawnLayer> layers) {
  const std::size_t drawn = std::min(layers.size(), kMostDrawn);
  const double height = kTop + kRow * static_cast<double>(drawn) + 26;
  std::string out =
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + fixed(kWidth, 0) + ' ' + fixed(height, 0) +
      "\" width=\"" + fixed(kWidth, 0) + "\" height=\"" + fixed(height, 0) +
      "\" role=\"img\" aria-label=\"Load of each device, today and as planned\">\n"
      "<style>\n"
      "svg{background:#fff;font:12px system-ui,sans-serif}text{fill:#222}.mid,.in{text-anchor:middle}"
      ".in{font-size:10px;fill:#fff}.end{text-anchor:end}.soft{fill:#555}\n"
      ".kept{fill:#0072b2}.kept.odd{fill:#3b8fc4}.moved{fill:#b34e00}.moved.odd{fill:#d0661a}"
      "rect{stroke:#fff;stroke-width:.5}line{stroke:#555;stroke-dasharray:4 3}\n"
      "@media(prefers-color-scheme:dark){svg{background:#16181c}text{fill:#e6e6e6}.in{fill:#fff}"
      ".soft{fill:#b0b0b0}rect{stroke:#16181c}line{stroke:#b0b0b0}}\n"
      "</style>\n";
  out += text_at(kMargin, 20, "Load of each device over the mean, on the steps that the plan has not seen",
                 " font-weight=\"600\"");
  out += "<rect x=\"" + fixed(kMargin, 1) + "\" y=\"30\" width=\"11\" height=\"11\" class=\"kept\"/>" +
         text_at(kMargin + 16, 40, "a copy of an expert") + "<rect x=\"" + fixed(kMargin + 150, 1) +
         "\" y=\"30\" width=\"11\" height=\"11\" class=\"moved\"/>" +
         text_at(kMargin + 166, 40, "one that moves here") +
         text_at(kMargin + 310, 40, "dashed: the mean, which is even", " class=\"soft\"");
  const double panel = (kWidth - 2 * kMargin - kGap) / 2;
  for (std::size_t l = 0; l < drawn; ++l) {
    const DrawnLayer& layer = layers[l];
    const double top = 1.15 * std::max({1.0, largest_device(layer.today, layer.loads),
                                        largest_device(layer.plan, layer.loads)});
    const double base = kTop + kRow * static_cast<double>(l) + 28 + kHeight;
    const std::vector<bool> none(layer.today.experts.size(), false);
    for (const bool planned : {false, true}) {
      const double left = kMargin + (planned ? panel + kGap : 0);
      out += text_at(left, base - kHeight - 8,
                     (planned ? "planned" : "layer " + std::to_string(layer.layer) + ", today") +
                         ": balancedness " + fixed(planned ? layer.balanced_plan : layer.balanced_today, 3));
      out += planned ? bars(layer.plan, moved(layer.start, layer.plan), layer.loads, left, panel, base, top)
                     : bars(layer.today, none, layer.loads, left, panel, base, top);
      const std::string even = fixed(base - kHeight / top, 1);
      out += "<line x1=\"" + fixed(left, 1) + "\" x2=\"" + fixed(left + panel, 1) + "\" y1=\"" + even +
             "\" y2=\"" + even + "\"/>\n";
      out += text_at(left - 4, base - kHeight / top + 4, "1", " class=\"end\"");
    }
  }
  out +=
      text_at(kMargin, height - 8,
              drawn < layers.size()
                  ? std::to_string(layers.size() - drawn) + " more layers are not drawn: those that gain less"
                  : std::string("Device numbers below the bars, expert numbers in them."),
              " class=\"soft\"");
  return out + "</svg>\n";
}

}  // namespace moectl::cli
