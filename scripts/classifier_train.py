from guided_diffusion.commands.classifier_train import main

if __name__ == "__main__":
    main()
