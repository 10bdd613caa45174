"""Tables read from the data folder: E. coli, house prices, weather."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fisherlab.datasets.bundled import CC_BY, STANDARDISED, UCI, WITH_TARGET
from fisherlab.datasets.card import Card, File
from fisherlab.datasets.prepare import SPLIT, STRATIFIED, as_dataset
from fisherlab.datasets.registry import Dataset, register
from fisherlab.datasets.registry import card as registered

WEATHER = [
    "Humidity",
    "Wind Speed (km/h)",
    "Wind Bearing (degrees)",
    "Visibility (km)",
    "Pressure (millibars)",
]

# pandas takes half a second to import, so the loaders do.


@register(
    Card(
        name="ecoli",
        title="Where in the cell a protein of E. coli is found, from 7 scores; 336 rows",
        task="classification",
        num_classes=8,
        input_shape=(7,),
        train_examples=271,
        source="P. Horton, K. Nakai, A probabilistic classification system for predicting the "
        f"cellular localization sites of proteins, ISMB 1996; {UCI}",
        licence=CC_BY,
        split=STRATIFIED,
        files=(
            File(
                "ecoli/ecoli.data",
                "f4d05b8c63d7a34a89f73e94024011913832435a4bc201c1d447bf6af139a895",
            ),
        ),
        preparation=STANDARDISED,
        notes="classes in alphabetical order (cp im imL imS imU om omL pp); imL and imS have two "
        "rows each; lip and chg are nearly constant",
        obtain="The values are those of UCI's Ecoli, its spacing differs; copy the file from "
        "who has it",
    )
)
def ecoli(card: Card, files: dict[str, Path]) -> Dataset:
    """336 rows of 7 scores."""
    text = files[card.files[0].path].read_text(encoding="utf-8")
    rows = [line.split() for line in text.splitlines() if line]
    _, labels = np.unique([row[8] for row in rows], return_inverse=True)
    return as_dataset(card, np.array([row[1:8] for row in rows], dtype=float), labels)


@register(
    Card(
        name="house_prices",
        title="Logarithm of the price of 21,613 houses in King County from 18 properties",
        task="regression",
        num_classes=None,
        input_shape=(18,),
        train_examples=17_291,
        source="house sales in King County, Washington, May 2014 to May 2015; "
        "Kaggle harlfoxem/housesalesprediction",
        licence="CC0, public domain",
        split=SPLIT,
        files=(
            File(
                "kc_house/kc_house_data.csv.gz",
                "6c896a24ac3e559244312d1e22a21c1da1a0cc5213b2241a9c564137e96284db",
            ),
        ),
        preparation=f"natural logarithm of the price; {WITH_TARGET}",
        notes="id and date are left out; zip code, latitude and longitude are plain numbers",
        obtain="Kaggle asks for an account; the csv there must be compressed to these bytes, "
        "so copy the file from who has it",
    )
)
def house_prices(card: Card, files: dict[str, Path]) -> Dataset:
    """21,613 rows of 18 properties; the target is log price in US dollars."""
    features, price = _houses(files[card.files[0].path])
    return as_dataset(card, features, np.log(price))


@register(
    replace(
        registered("house_prices"),
        name="house_prices_raw",
        title="Price of 21,613 houses in King County from 18 properties",
        preparation=WITH_TARGET,
        notes="house_prices without the logarithm; the numbers of NGM table 1 point to it",
    )
)
def house_prices_raw(card: Card, files: dict[str, Path]) -> Dataset:
    """21,613 rows of 18 properties; the target is the price in US dollars."""
    return as_dataset(card, *_houses(files[card.files[0].path]))


def _houses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The properties `[n, 18]` and the price `[n]`."""
    import pandas as pd

    table = pd.read_csv(path)
    features = table.drop(columns=["id", "date", "price"])
    return features.to_numpy(float), table["price"].to_numpy(float)


@register(
    Card(
        name="weather",
        title="Temperature in Szeged from 5 other measurements of the same hour; 96,453 rows",
        task="regression",
        num_classes=None,
        input_shape=(len(WEATHER),),
        train_examples=77_163,
        source="history of Szeged, Hungary, 2006 to 2016 (Dark Sky); "
        "Kaggle budincsevity/szeged-weather, muthuj7/weather-dataset",
        licence="CC BY-NC-SA 4.0; treat as non-commercial",
        split=SPLIT + " (hours of one day fall on both sides)",
        files=(
            File(
                "weather_szeged/weatherHistory.csv.gz",
                "0afbc6804e858b5e597b23088176f31730c57cacbc700a5d3a6c288be07611f6",
            ),
        ),
        preparation=WITH_TARGET,
        notes="humidity, wind speed and bearing, visibility, pressure; the 1,288 hours at which the"
        " pressure reads 0 get its training mean; Loud Cover, all zero, is left out",
        obtain="Kaggle asks for an account; the csv there must be compressed to these bytes, "
        "so copy the file from who has it",
    )
)
def weather(card: Card, files: dict[str, Path]) -> Dataset:
    """96,453 hours of 5 measurements; the target is the temperature in degrees Celsius."""
    measured = _hours(files[card.files[0].path])
    return as_dataset(card, measured[:, :-2], measured[:, -2])


@register(
    replace(
        registered("weather"),
        name="weather_apparent",
        title="Apparent temperature in Szeged from the temperature and 5 other measurements; "
        "96,453 rows",
        input_shape=(len(WEATHER) + 1,),
        notes="weather with the temperature among the inputs and the apparent one as target; the "
        "numbers of NGM table 1 point to it; gaps of the pressure as in weather",
    )
)
def weather_apparent(card: Card, files: dict[str, Path]) -> Dataset:
    """96,453 hours of 6 measurements; the target is the apparent temperature in Celsius."""
    measured = _hours(files[card.files[0].path])
    return as_dataset(card, measured[:, :-1], measured[:, -1])


def _hours(path: Path) -> np.ndarray:
    """The 5 measurements, the temperature and the apparent one, `[n, 7]`; NaN in gaps."""
    import pandas as pd

    columns = [*WEATHER, "Temperature (C)", "Apparent Temperature (C)"]
    table = pd.read_csv(path, usecols=columns)[columns]
    pressure = WEATHER[-1]
    return table.assign(**{pressure: table[pressure].replace(0.0, np.nan)}).to_numpy(float)
