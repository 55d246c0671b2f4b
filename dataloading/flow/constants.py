"""Names of the flow estimators, the size of their flow and the range of its bytes; imports nothing heavy."""

TVL1 = "tvl1"
OPENCV_TVL1 = "opencv-tvl1"
DIS = "dis"
ESTIMATORS = (TVL1, OPENCV_TVL1, DIS)
SCALES = {TVL1: 1.0, OPENCV_TVL1: 0.5, DIS: 1.0}  # flow size as a share of the frame size
BOUND = 20.0  # pixels of the stored frame; each flow component is clipped to [-BOUND, BOUND]
