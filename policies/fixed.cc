// fixed: leaves the actuator where it starts.
//
//   wanted = in force
//
// The baseline of every comparison, and what an actuator that the config does not mention does: no bias, no
// auxiliary loss, an untouched softmax. Because the limits still stand behind it, `fixed` with an initial
// value is also the way to hold a weight while the other actuators move (the usual aux weights: 1e-3 in arXiv
// 2408.15664, 1e-2 in Switch Transformers, arXiv 2101.03961).
//
// Limitations: it is open loop. A fixed auxiliary weight that balances one model starves another of its task loss.
#include "policies/builtin.h"

namespace moectl::policies {
namespace {

class Fixed final : public Policy {
 public:
  void propose(const LayerView&, std::span<double>) override {}
};

}  // namespace

PolicyDescription fixed() {
  PolicyDescription d;
  d.name = "fixed";
  d.summary = "leaves the actuator at its initial value";
  d.actuators = {Actuator::kExpertBias, Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.make = [](const PolicyContext&, const PolicyOptions&) { return std::make_unique<Fixed>(); };
  return d;
}

}  // namespace moectl::policies
