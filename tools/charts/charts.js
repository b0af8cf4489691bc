// What a report draws with, and no more of Apache ECharts than that: each line here is bytes in every report.
import { init, use } from "echarts/core";
import { HeatmapChart, LineChart } from "echarts/charts";
import { AriaComponent, GridComponent, TooltipComponent, VisualMapContinuousComponent } from "echarts/components";
import { SVGRenderer } from "echarts/renderers";

use([
  HeatmapChart, LineChart,
  AriaComponent, GridComponent, TooltipComponent, VisualMapContinuousComponent,
  SVGRenderer,
]);

export { init };
