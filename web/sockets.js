// Sockets of the pack's own types: their colours, and what to do instead of a connection that the page refuses, such as
// our VAE at core's VAE Decode. The page does not say why it makes no link.
import { app } from "../../scripts/app.js"
import { show, texts } from "./page.js"

// For dark and light themes; all differ from core's colours, and from each other (tests/comfyui/test_page.py).
const COLOURS = {
    ASCEND_MODEL: ["#4C6FFA", "#6D10F9"],
    ASCEND_TEXT_ENCODER: ["#90BF22", "#8B5504"],
    ASCEND_VAE: ["#EF0692", "#F9248F"],
    ASCEND_PARALLEL: ["#06DB06", "#05B305"],
    ASCEND_PROFILE: ["#CA10F9", "#F910F9"],
    ASCEND_ACCELERATION: ["#EF0606", "#156579"],
}
const LIGHT = 128 // the mean of red, green and blue from which the colour of a node is light

// Of our types: core's type in its place, our nodes that take it, and our loaders of the one and of the other type.
const TWINS = {
    ASCEND_MODEL: {
        core: "MODEL",
        users: ["AscendSampler", "AscendSamplerAdvanced", "AscendLoadLora"],
        loader: "AscendLoadDiffusionModel",
        coreLoader: "AscendUNETLoader",
    },
    ASCEND_TEXT_ENCODER: {
        core: "CLIP",
        users: ["AscendTextEncode"],
        loader: "AscendLoadTextEncoder",
        coreLoader: "AscendCLIPLoader",
    },
    ASCEND_VAE: {
        core: "VAE",
        users: ["AscendVAEDecode", "AscendVAEEncode", "AscendImageToVideo"],
        loader: "AscendLoadVAE",
        coreLoader: "AscendVAELoader",
    },
}
// Where core's node has one twin of ours.
const INSTEAD = {
    KSampler: "AscendSampler",
    KSamplerAdvanced: "AscendSamplerAdvanced",
    SamplerCustom: "AscendSampler",
    LoraLoader: "AscendLoadLora",
    LoraLoaderModelOnly: "AscendLoadLora",
    CLIPTextEncode: "AscendTextEncode",
    VAEDecode: "AscendVAEDecode",
    VAEDecodeTiled: "AscendVAEDecode",
    VAEEncode: "AscendVAEEncode",
    VAEEncodeTiled: "AscendVAEEncode",
    WanImageToVideo: "AscendImageToVideo",
    WanFirstLastFrameToVideo: "AscendImageToVideo",
    Wan22ImageToVideoLatent: "AscendImageToVideo",
    HunyuanImageToVideo: "AscendImageToVideo",
}

// ---- colours

function isLight() {
    const [, ...parts] = /^#(\w\w)(\w\w)(\w\w)/.exec(`${LiteGraph.NODE_DEFAULT_BGCOLOR}`) ?? []
    return parts.reduce((sum, part) => sum + parseInt(part, 16), 0) / 3 >= LIGHT
}

const colourOf = type => COLOURS[type][isLight() ? 1 : 0]

// For Nodes 2.0; the classic canvas asks its two tables.
const sheet = document.head.appendChild(document.createElement("style"))

function writeSheet() {
    const variables = Object.keys(COLOURS).map(type => `--color-datatype-${type}: ${colourOf(type)};`)
    sheet.textContent = `body { ${variables.join(" ")} }`
}

// The page empties the entries of types that its theme does not name, each time that it loads one.
function paint(table, type) {
    let ofTheme = ""
    Object.defineProperty(table, type, {
        configurable: true,
        enumerable: true,
        get: () => ofTheme || colourOf(type),
        set(colour) {
            ofTheme = colour
            setTimeout(writeSheet) // when all of the theme is there
        },
    })
}

// ---- connections that are refused

const nameOf = type => LiteGraph.registered_node_types[type]?.title ?? type
const known = types => types.filter(type => type in LiteGraph.registered_node_types)

// What to do where a link from a socket of type `output` was dropped on a node that takes `inputs`; null: nothing to say.
function advice(output, node, inputs) {
    const words = texts("sockets")
    const types = inputs.map(({ type }) => type)
    const fits = inputs.some(({ type }) => LiteGraph.isValidConnection(output, type))
    if (fits) return null
    const ours = TWINS[output]
    if (ours && types.includes(ours.core)) {
        const instead = known([INSTEAD[node.type] ?? ""])
        const names = (instead.length ? instead : known(ours.users)).map(nameOf)
        return [output, ours.core, [words.use(names.join(words.or)), words.load(nameOf(ours.coreLoader), ours.core)]]
    }
    const wanted = Object.keys(TWINS).find(type => TWINS[type].core === output && types.includes(type))
    return wanted ? [output, wanted, [words.need(nameOf(TWINS[wanted].loader))]] : null
}

// At the end of a drag, before the page looks at what is below.
function whenDropped(event) {
    const { linkConnector, graph } = app.canvas ?? {}
    const link = linkConnector?.isConnecting ? linkConnector.renderLinks?.[0] : null
    if (!link?.node || !link.fromSlot || !graph) return
    const element = document.elementFromPoint(event.clientX, event.clientY)?.closest("[data-node-id]")
    const [x, y] = app.canvas.convertEventToCanvasOffset(event)
    const node = element ? graph.getNodeById(element.dataset.nodeId) : graph.getNodeOnPos(x, y)
    if (!node || node === link.node) return
    const said = linkConnector.state.connectingTo === "input"
        ? advice(link.fromSlot.type, node, node.inputs ?? [])
        : (node.outputs ?? []).map(({ type }) => advice(type, link.node, [link.fromSlot])).find(Boolean)
    if (said) show("warn", texts("sockets").mismatch(said[0], said[1]), said[2])
}

app.registerExtension({
    name: "AscendVideo.Sockets",
    setup() {
        for (const table of [app.canvas.default_connection_color_byType, window.LGraphCanvas.link_type_colors])
            Object.keys(COLOURS).forEach(type => paint(table, type))
        writeSheet()
        window.addEventListener("pointerup", whenDropped, true) // before the page, which stops it there
    },
})
