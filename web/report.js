// Shows on Ascend Sampler what its last video took and what accelerators saved. ComfyUI's page removes a text that
// was sent while a job ran once it ends; what a node puts out (`ui` in nodes/sampler.py) stays.
import { app } from "../../scripts/app.js"

const NODE = "AscendSampler"
const WIDGET = "report"
const HEIGHT = 64 // pixels, about four lines; more can be scrolled

function addReport(node) {
    const element = document.createElement("div")
    element.className = "ascend-report"
    element.style.cssText =
        "overflow-y: auto; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text; padding: 4px 8px;" +
        "color: var(--input-text); background: var(--comfy-input-bg); font-size: 11px; line-height: 1.3;" +
        `border-radius: 4px; box-sizing: border-box; max-height: ${HEIGHT}px`
    element.addEventListener("wheel", event => event.stopPropagation()) // scrolls the text, not the canvas
    const widget = node.addDOMWidget(WIDGET, "ascend-report", element, {
        serialize: false, // of the prompt
        getMinHeight: () => HEIGHT,
        getMaxHeight: () => HEIGHT,
        getValue: () => element.textContent,
        setValue: text => (element.textContent = text),
    })
    widget.serialize = false // of the saved workflow
    node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])])
    return widget
}

function showReport(node, output) {
    if (node?.type !== NODE || !output?.text) return
    const widget = node.widgets.find(({ name }) => name === WIDGET) ?? addReport(node)
    widget.value = output.text.join("\n")
    node.setDirtyCanvas(true)
}

app.registerExtension({
    name: "AscendVideo.Report",
    beforeRegisterNodeDef(nodeType, { name }) {
        if (name !== NODE) return
        const { onExecuted } = nodeType.prototype
        nodeType.prototype.onExecuted = function (output) {
            onExecuted?.apply(this, arguments)
            showReport(this, output)
        }
    },
    // A workflow is shown again: from another tab, or from the list of what was run.
    onNodeOutputsUpdated(outputs) {
        for (const [id, output] of Object.entries(outputs)) showReport(app.graph.getNodeById(id), output)
    },
})
