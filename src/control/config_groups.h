// The sections of layer groups and timeline entries, by actuator.
#pragma once

#include "moectl/config.h"

namespace moectl {

/// The section for an actuator, or nothing.
template <class Overrides>  // const or not
auto& section_of(Overrides& sections, Actuator which) {
  return which == Actuator::kExpertBias      ? sections.expert_bias
         : which == Actuator::kAuxLossWeight ? sections.aux_loss_weight
                                             : sections.router_temperature;
}

/// Whether a layer is frozen after an entry of the timeline, if it is `frozen` before. Thawing wins.
bool frozen_after(const TimelineEntry& entry, int layer, bool frozen);

/// What holds for the layers of a group, where `common` holds for all: see config_at.
LayerSettings settings_of(const ControllerConfig& common, const LayerGroup& group);

/// The config's own sections as they are at a step, without groups and timeline.
ControllerConfig config_at(const ControllerConfig& config, std::int64_t step);

}  // namespace moectl
