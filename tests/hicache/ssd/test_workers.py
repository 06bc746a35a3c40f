from hicache.ssd.workers import Speed


def test_the_speed_is_that_of_the_time_in_which_something_was_read() -> None:
    speed = Speed()
    assert speed.time_s(1000, 0.0) == 0.0, "nothing has been measured"
    speed.begin(10.0)
    speed.begin(10.5)
    speed.end(11.0, 300)
    speed.end(12.0, 700)
    speed.begin(50.0)
    speed.end(51.0, 500)
    assert speed.time_s(500, 51.0) == 1.0, "1,500 bytes in three seconds"


def test_a_speed_is_forgotten_so_that_a_disk_that_was_slow_is_asked_again() -> None:
    speed = Speed()
    speed.begin(10.0)
    speed.end(20.0, 100)
    assert speed.time_s(100, 79.0) == 10.0
    assert speed.time_s(100, 81.0) == 0.0
    speed.begin(90.0)
    assert speed.time_s(100, 200.0) == 10.0, "it is being read"


def test_old_readings_count_less() -> None:
    speed = Speed()
    speed.begin(0.0)
    speed.end(10.0, 10)
    for second in range(10, 40):
        speed.begin(float(second))
        speed.end(second + 1.0, 1000)
    assert speed.time_s(1000, 40.0) < 1.1
