"""Captions of scenes: English, Chinese or mixed, short or long.

Text-to-video captions say subject, action, surroundings and light (and sometimes the camera); image-to-video captions
say how the camera moves, how the subject moves, and how the surroundings change, since the image shows the rest.

Free ones, which training reads, are nearer to what people write: light may be an adjective of the place, or left out by
day; there are more verbs; and words of style say nothing of the scene.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from turbo_training.scene import Actor, Scene

LANGUAGES = ("en", "zh", "mixed")
TASKS = ("t2v", "i2v")

_Words = dict[str, tuple[str, ...]]

_SUBJECTS: dict[str, _Words] = {
    "en": {
        "circle": ("circle", "ball", "round ball"),
        "square": ("square", "box", "square block"),
        "triangle": ("triangle",),
        "star": ("star", "five-pointed star"),
        "cat": ("cat", "kitten", "little cat"),
        "car": ("car", "little car", "toy car"),
    },
    "zh": {
        "circle": ("个{}圆球", "个{}球", "个{}圆形"),
        "square": ("个{}方块", "个{}正方形", "个{}方形"),
        "triangle": ("个{}三角形",),
        "star": ("颗{}星星", "颗{}五角星"),
        "cat": ("只{}猫", "只{}小猫", "只{}猫咪"),
        "car": ("辆{}汽车", "辆{}小汽车", "辆{}小车"),
    },
}
_COLORS: dict[str, _Words] = {
    "en": {name: (name,) for name in ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")},
    "zh": {
        "red": ("红色的", "红"),
        "orange": ("橙色的", "橘色的"),
        "yellow": ("黄色的", "黄"),
        "green": ("绿色的", "绿"),
        "blue": ("蓝色的", "蓝"),
        "purple": ("紫色的", "紫"),
        "pink": ("粉色的", "粉红色的"),
        "white": ("白色的", "白"),
    },
}
#: Both forms of a verb: "moves left" and "moving left".
_MOTIONS_EN: dict[str, tuple[tuple[str, str], ...]] = {
    "left": (("moves to the left", "moving to the left"), ("slides left", "sliding left"),
             ("goes from right to left", "going from right to left")),
    "right": (("moves to the right", "moving to the right"), ("slides right", "sliding right"),
              ("goes from left to right", "going from left to right")),
    "up": (("moves up", "moving up"), ("rises", "rising"), ("floats upward", "floating upward")),
    "down": (("moves down", "moving down"), ("sinks", "sinking"), ("falls slowly downward", "falling slowly downward")),
    "bounce": (("bounces", "bouncing"), ("bounces up and down", "bouncing up and down"), ("hops", "hopping")),
    "circle": (("moves in a circle", "moving in a circle"), ("circles around", "circling around"),
               ("flies in a loop", "flying in a loop")),
    "grow": (("grows larger", "growing larger"), ("gets bigger and bigger", "getting bigger and bigger"),
             ("grows", "growing")),
    "spin": (("spins", "spinning"), ("spins in place", "spinning in place"), ("rotates", "rotating"),
             ("turns around itself", "turning around itself")),
}  # fmt: skip
_MOTIONS_ZH: _Words = {
    "left": ("向左移动", "从右向左移动", "往左滑动"),
    "right": ("向右移动", "从左向右移动", "往右滑动"),
    "up": ("向上移动", "缓缓上升", "往上飘"),
    "down": ("向下移动", "缓缓下降", "往下沉"),
    "bounce": ("弹跳", "上下弹跳", "蹦蹦跳跳"),
    "circle": ("绕圈移动", "转圈飞行", "绕着圈走"),
    "grow": ("变大", "越来越大", "慢慢变大"),
    "spin": ("旋转", "原地旋转", "原地自转"),
}
_PLACES: dict[str, _Words] = {
    "en": {
        "meadow": ("in a meadow", "on a green meadow", "over grassy hills"),
        "beach": ("on a beach", "at the seaside", "by the sea"),
        "city": ("in a city", "in a city street", "in front of tall buildings"),
        "mountains": ("in the mountains", "in front of snowy mountains", "among snowy peaks"),
        "desert": ("in a desert", "in the desert with pyramids", "over sand dunes"),
        "forest": ("in a forest", "in a pine forest", "in front of tall trees"),
    },
    "zh": {
        "meadow": ("草地上", "绿色的草原上", "青草山坡上"),
        "beach": ("海滩上", "海边", "沙滩上"),
        "city": ("城市里", "城市街道上", "高楼大厦前"),
        "mountains": ("山里", "雪山前", "雪峰之间"),
        "desert": ("沙漠里", "有金字塔的沙漠里", "沙丘上"),
        "forest": ("森林里", "松树林里", "大树前"),
    },
}
_LIGHTS: dict[str, _Words] = {
    "en": {
        "day": ("by day", "in daylight", "on a sunny day"),
        "night": ("at night", "under the stars", "on a dark night"),
        "neon": ("in neon light", "with neon lights", "in glowing neon style"),
    },
    "zh": {
        "day": ("白天", "阳光明媚", "日光下"),
        "night": ("夜晚", "星空下", "黑夜"),
        "neon": ("霓虹灯光", "霓虹灯下", "霓虹风格"),
    },
}
_LIGHT_SENTENCES: dict[str, _Words] = {
    "en": {
        "day": ("The sun is shining in a bright blue sky.", "It is a clear sunny day."),
        "night": ("It is night, with the moon and stars in a dark sky.", "Stars and the moon shine in the dark."),
        "neon": ("Everything glows in neon light.", "Neon lines glow pink and cyan in the dark."),
    },
    "zh": {
        "day": ("阳光明媚，天空湛蓝。", "晴朗的白天。"),
        "night": ("夜晚，天上有月亮和星星。", "黑夜里星光闪烁。"),
        "neon": ("一切都在霓虹灯下发光。", "霓虹线条在黑暗中发光。"),
    },
}
#: What free captions have besides.
_MORE_MOTIONS_EN: dict[str, tuple[tuple[str, str], ...]] = {
    "left": (("walks to the left", "walking to the left"), ("runs left", "running left"),
             ("drives to the left", "driving to the left")),
    "right": (("walks to the right", "walking to the right"), ("runs right", "running right"),
              ("drives to the right", "driving to the right")),
    "up": (("flies up", "flying up"), ("climbs into the sky", "climbing into the sky")),
    "down": (("drops", "dropping"), ("comes down", "coming down")),
    "bounce": (("jumps up and down", "jumping up and down"), ("jumps", "jumping")),
    "circle": (("goes round in circles", "going round in circles"), ("flies in circles", "flying in circles")),
    "grow": (("becomes larger", "becoming larger"), ("swells", "swelling")),
    "spin": (("whirls", "whirling"), ("turns round and round", "turning round and round")),
}  # fmt: skip
_MORE_MOTIONS_ZH: _Words = {
    "left": ("向左走", "往左跑", "向左行驶"),
    "right": ("向右走", "往右跑", "向右行驶"),
    "up": ("向上飞", "飞上天空"),
    "down": ("往下掉", "落下来"),
    "bounce": ("上下跳动", "跳来跳去"),
    "circle": ("转圈", "绕圈飞"),
    "grow": ("变得越来越大", "不断变大"),
    "spin": ("转动", "不停地旋转"),
}
_MORE_LIGHTS: dict[str, _Words] = {
    "en": {
        "day": ("in soft morning light", "in warm sunlight", "under a blue sky", "in bright light"),
        "night": ("under the moon", "in moonlight", "in the dark"),
        "neon": ("lit by neon signs", "neon glow", "cyberpunk neon"),
    },
    "zh": {
        "day": ("清晨的阳光", "柔和的晨光", "蓝天下", "晴天"),
        "night": ("月光下", "深夜", "夜空下"),
        "neon": ("霓虹闪烁", "霓虹光", "赛博朋克霓虹"),
    },
}
_LIT_PLACES_EN: _Words = {
    "meadow": ("in a {} meadow", "across a {} meadow", "over {} grassy hills"),
    "beach": ("on a {} beach", "at the {} seaside"),
    "city": ("in a {} city", "in a {} city street"),
    "mountains": ("in the {} mountains", "among {} snowy peaks"),
    "desert": ("in a {} desert", "over {} sand dunes"),
    "forest": ("in a {} forest", "in a {} pine forest"),
}
_LIT: dict[str, _Words] = {
    "en": {"day": ("sunny", "bright", "sunlit"), "night": ("dark", "moonlit", "starry"), "neon": ("neon", "neon-lit")},
    "zh": {
        "day": ("阳光下的", "晴天的", "明亮的"),
        "night": ("夜晚的", "星空下的", "黑暗的"),
        "neon": ("霓虹灯下的", "霓虹风格的"),
    },
}
_STYLES: dict[str, tuple[str, ...]] = {
    "en": ("cinematic", "cinematic style", "high quality", "highly detailed", "4k", "smooth motion", "a short video"),
    "zh": ("电影感", "高清", "画质清晰", "画面精美", "动作流畅", "细节丰富", "短视频"),
}
#: Share of free captions with light as an adjective, of those by day that say nothing of it, and of those with a style.
_LIT_SHARE, _UNSAID_DAY_SHARE, _STYLE_SHARE = 0.25, 0.15, 0.35
#: Share of words that only free captions have, where there are both.
_MORE_SHARE = 0.35
_LIGHT_CHANGES: dict[str, _Words] = {
    "en": {
        "day": ("day breaks", "it turns to bright daylight", "the sun comes out"),
        "night": ("night falls", "it turns dark and stars appear", "it becomes night"),
        "neon": ("neon lights come on", "everything begins to glow in neon", "it turns to neon light"),
    },
    "zh": {
        "day": ("天亮了", "变成白天", "太阳出来了"),
        "night": ("夜幕降临", "变成夜晚", "天黑了，星星出现"),
        "neon": ("霓虹灯亮起", "变成霓虹风格", "一切开始发出霓虹光"),
    },
}
_UNCHANGED: dict[str, tuple[str, ...]] = {
    "en": ("the surroundings stay the same", "the scene does not change", "the light stays the same"),
    "zh": ("周围环境不变", "场景保持不变", "光线不变"),
}
_CAMERAS: dict[str, _Words] = {
    "en": {
        "static": ("the camera is still", "static camera", "the camera does not move"),
        "pan_left": ("the camera pans left", "the camera pans to the left", "camera panning left"),
        "pan_right": ("the camera pans right", "the camera pans to the right", "camera panning right"),
        "zoom_in": ("the camera zooms in", "the camera moves closer", "slow zoom in"),
        "zoom_out": ("the camera zooms out", "the camera moves away", "slow zoom out"),
    },
    "zh": {
        "static": ("镜头静止", "固定镜头", "镜头不动"),
        "pan_left": ("镜头向左平移", "镜头左移", "镜头向左摇"),
        "pan_right": ("镜头向右平移", "镜头右移", "镜头向右摇"),
        "zoom_in": ("镜头推近", "镜头拉近", "镜头缓缓推进"),
        "zoom_out": ("镜头拉远", "镜头后退", "镜头缓缓拉远"),
    },
}


def caption(scene: Scene, language: str, generator: random.Random, *, task: str = "t2v", free: bool = False) -> str:
    """Describes a scene in words drawn anew each time.

    Args:
        scene: what to describe; only `t2v` captions assume that the light does not change.
        language: `en`, `zh`, or `mixed` (words of the other language inside a sentence, or a sentence of each).
        task: `t2v` or `i2v`.
        free: nearer to what people write.

    Raises:
        ValueError: an unknown language or task.
    """
    if language not in LANGUAGES or task not in TASKS:
        raise ValueError(f"caption in {language!r} for {task!r}: languages are {LANGUAGES}, tasks {TASKS}")
    frame = language if language != "mixed" else generator.choice(("en", "zh"))
    words = _Phrases(frame, generator, mix=0.4 if language == "mixed" else 0.0, free=free)
    text = words.text_to_video(scene) if task == "t2v" else words.image_to_video(scene)
    text = words.with_style(text)
    if language == "mixed" and not _is_mixed(text):
        # No word happened to change language: the light says itself in the other one.
        other = _Phrases("zh" if frame == "en" else "en", generator, mix=0.0)
        text = f"{text.rstrip('.。')}, {other.pick(_LIGHTS, scene.light_end)}"
    return " ".join(text.split())


def _is_mixed(text: str) -> bool:
    has_latin = any("a" <= letter <= "z" for letter in text.lower())
    return has_latin and not text.isascii()


class _Phrases:
    """The wording of one caption."""

    def __init__(self, language: str, generator: random.Random, *, mix: float, free: bool = False) -> None:
        self._language = language
        self._generator = generator
        self._mix = mix
        self._free = free

    def with_style(self, text: str) -> str:
        """The same, in a free caption perhaps with a style behind it."""
        if not self._draws(_STYLE_SHARE):
            return text
        end = text[-1] if text.endswith((".", "。")) else ""
        comma = "，" if self._language == "zh" else ", "
        return f"{text.removesuffix(end)}{comma}{self._one_of(_STYLES[self._tongue()])}{end}"

    def _draws(self, share: float) -> bool:
        """Whether a free caption does what so many of them do."""
        return self._free and self._generator.random() < share

    def pick(self, table: dict[str, _Words], key: str) -> str:
        """A phrase of the caption's language; in a mixed caption sometimes of the other."""
        return self._generator.choice(table[self._tongue()][key])

    def _tongue(self) -> str:
        if self._generator.random() < self._mix:
            return "zh" if self._language == "en" else "en"
        return self._language

    def _one_of(self, choices: Sequence[str]) -> str:
        return self._generator.choice(choices)

    def text_to_video(self, scene: Scene) -> str:
        is_long = self._generator.random() < 0.4
        mentions_camera = self._generator.random() < (0.7 if scene.camera != "static" else 0.15)
        is_lit = self._draws(_LIT_SHARE)
        place = self._lit_place(scene) if is_lit else self.pick(_PLACES, scene.surroundings)
        camera = self.pick(_CAMERAS, scene.camera) if mentions_camera else ""
        says_light = not is_lit and not (scene.light == "day" and self._draws(_UNSAID_DAY_SHARE))
        if self._language == "zh":
            return self._chinese_scene(scene, place, camera, is_long=is_long, says_light=says_light)
        return self._english_scene(scene, place, camera, is_long=is_long, says_light=says_light)

    def _lit_place(self, scene: Scene) -> str:
        """The place with the light as its adjective."""
        tongue = self._tongue()
        light = self._one_of(_LIT[tongue][scene.light])
        if tongue == "zh":
            return f"{light}{self._one_of(_PLACES['zh'][scene.surroundings])}"
        return self._one_of(_LIT_PLACES_EN[scene.surroundings]).format(light)

    def _light(self, scene: Scene) -> str:
        return self.pick(_MORE_LIGHTS if self._draws(_MORE_SHARE) else _LIGHTS, scene.light)

    def _english_scene(self, scene: Scene, place: str, camera: str, *, is_long: bool, says_light: bool) -> str:
        doing = self._generator.random() < 0.3
        subjects = self._join([self._english_actor(actor, doing) for actor in scene.actors], " and ", scene)
        if is_long:
            sentence = f"{_capital(subjects)} {place}."
            if says_light:
                sentence = f"{sentence} {self._one_of(_LIGHT_SENTENCES['en'][scene.light])}"
            return f"{sentence} {_capital(camera)}." if camera else sentence
        if not says_light:
            return f"{subjects} {place}, {camera}" if camera else f"{subjects} {place}"
        light = self._light(scene)
        form = self._generator.randrange(4)
        if form == 0:
            text = f"{subjects} {place} {light}"
        elif form == 1:
            text = f"{_capital(subjects)} {place}, {light}"
        elif form == 2:
            text = f"{_capital(light)}, {subjects} {place}"
        else:
            text = f"{subjects}, {place.removeprefix('in ').removeprefix('on ')}, {light}"
        text = f"{text}, {camera}" if camera else text
        return f"{text}." if self._generator.random() < 0.3 else text

    def _chinese_scene(self, scene: Scene, place: str, camera: str, *, is_long: bool, says_light: bool) -> str:
        actors = [self._chinese_actor(actor) for actor in scene.actors]
        at = f"在{place}" if not place.isascii() else f" {place} "
        if len(actors) == 1:
            (subject, motion), *_ = actors
            body = self._one_of(
                (f"{subject}{at}{motion}", f"{subject}{motion}，{at.strip()}", f"{place}，{subject}{motion}")
            )
        else:
            parts = self._join([f"{subject}{motion}" for subject, motion in actors], "，", scene)
            body = self._one_of((f"{at.strip()}，{parts}", f"{parts}，{at.strip()}"))
        if is_long:
            text = f"{body}。{self._one_of(_LIGHT_SENTENCES['zh'][scene.light])}" if says_light else f"{body}。"
            return f"{text}{camera}。" if camera else text
        if not says_light:
            return f"{body}，{camera}" if camera else body
        light = self._light(scene)
        text = self._one_of((f"{body}，{light}", f"{light}，{body}"))
        text = f"{text}，{camera}" if camera else text
        return f"{text}。" if self._generator.random() < 0.3 else text

    def image_to_video(self, scene: Scene) -> str:
        camera = self.pick(_CAMERAS, scene.camera)
        changes = scene.light != scene.light_end
        if self._language == "zh":
            name = self._generator.random() < 0.6
            moves = [
                f"{self._chinese_actor(actor)[0] if name or len(scene.actors) > 1 else '主体'}{self._motion_zh(actor)}"
                for actor in scene.actors
            ]
            parts = [camera, *moves]
            if changes or self._generator.random() < 0.4:
                parts.append(self.pick(_LIGHT_CHANGES, scene.light_end) if changes else self._one_of(_UNCHANGED["zh"]))
            return "，".join(parts) + "。"
        moves = []
        for actor in scene.actors:
            named = len(scene.actors) > 1 or self._generator.random() < 0.6
            subject = f"the {self._color_and_subject(actor)}" if named else self._one_of(("the subject", "it"))
            moves.append(f"{subject} {self._motion_en(actor)[0]}")
        parts = [camera, " and ".join(moves)]
        if changes or self._generator.random() < 0.4:
            parts.append(self.pick(_LIGHT_CHANGES, scene.light_end) if changes else self._one_of(_UNCHANGED["en"]))
        return _capital(", ".join(parts)) + "."

    def _color_and_subject(self, actor: Actor) -> str:
        """The color and the noun, either of them perhaps in the other language."""
        color = self.pick(_COLORS, actor.color)
        noun = self.pick(_SUBJECTS, actor.subject)
        if not noun.isascii():
            noun = noun.format("")[1:]  # without its measure word
        return f"{color}{noun}" if not (color.isascii() or noun.isascii()) else f"{color} {noun}"

    def _english_actor(self, actor: Actor, doing: bool) -> str:
        thing = self._color_and_subject(actor)
        article = "an" if thing.startswith("orange") else "a"
        if self._generator.random() < self._mix:
            return f"{article} {thing} {self._motion_zh(actor)}"
        verb, participle = self._motion_en(actor)
        return f"{article} {thing} {f'is {participle}' if doing else verb}"

    def _chinese_actor(self, actor: Actor) -> tuple[str, str]:
        color = self.pick(_COLORS, actor.color)
        color = f" {color} " if color.isascii() else color
        tongue = self._tongue()
        noun = self._one_of(_SUBJECTS[tongue][actor.subject])
        subject = (
            "一" + noun.format(color) if tongue == "zh" else f"一个{color}{'' if color.endswith(' ') else ' '}{noun} "
        )
        if self._generator.random() < self._mix:
            return subject, f" {self._motion_en(actor)[0]}"
        return subject, self._motion_zh(actor)

    def _motion_en(self, actor: Actor) -> tuple[str, str]:
        """Both forms of a verb."""
        return self._generator.choice((_MORE_MOTIONS_EN if self._draws(_MORE_SHARE) else _MOTIONS_EN)[actor.motion])

    def _motion_zh(self, actor: Actor) -> str:
        return self._one_of((_MORE_MOTIONS_ZH if self._draws(_MORE_SHARE) else _MOTIONS_ZH)[actor.motion])

    def _join(self, parts: list[str], conjunction: str, scene: Scene) -> str:
        if len(parts) == 2 and self._generator.random() < 0.25:
            if self._language == "zh":
                return f"左边{parts[0]}，右边{parts[1]}"
            return f"on the left {parts[0]}, on the right {parts[1]}"
        return conjunction.join(parts)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
